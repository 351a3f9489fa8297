"""Statistics of a layer's input: sums over samples, and standard errors.

Each sample is reduced to its mean and variance per channel at once, while it is in the cache and
independently of its batch, so results cannot depend on the batch size. Sums over samples are
float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.moments import Moments
from syncbn.nn.sample_stats import SampleStats, sample_stats

# Per-sample values that are buffered before they are summed.
_MAX_BUFFERED = 1 << 20
# Largest mean, in standard deviations, for seven digits of the variance from group norm.
_MAX_FAST_MEAN = 30


class SampleMoments(NamedTuple):
    """Sums over samples from which the scatter between samples is computed, float64.

    Sample i has n_i values per channel, of mean m_i and mean square q_i around a shared pivot.

    Attributes:
        samples: number of samples, scalar.
        squares: sum of n_i^2, scalar.
        m: sum of n_i^2 m_i, shape ``[C]``.
        mm: sum of n_i^2 m_i^2, shape ``[C]``.
        q: sum of n_i^2 q_i, shape ``[C]``.
        qq: sum of n_i^2 q_i^2, shape ``[C]``.
        mq: sum of n_i^2 m_i q_i, shape ``[C]``.
    """

    samples: Tensor
    squares: Tensor
    m: Tensor
    mm: Tensor
    q: Tensor
    qq: Tensor
    mq: Tensor


@dataclass(frozen=True)
class InputStats:
    """Additive statistics over a set of samples, so ranks and batches combine exactly.

    Attributes:
        moments: two-part sums of all values.
        scatter: sums of all samples around the pivot.
        pivot: shared pivot, float64 ``[C]``.
    """

    moments: Moments
    scatter: SampleMoments
    pivot: Tensor

    @staticmethod
    def zeros(pivot: Tensor) -> InputStats:
        """Return the statistics of no samples."""
        return InputStats.unpack(pivot.new_zeros(9 * pivot.numel() + 3), pivot)

    @staticmethod
    def from_samples(n: Tensor, mean: Tensor, var: Tensor, pivot: Tensor) -> InputStats:
        """Return the statistics of N samples.

        Args:
            n: values per channel in each sample, float64 ``[N, 1]``.
            mean: means of the samples, float64 ``[N, C]``.
            var: biased variances of the samples, float64 ``[N, C]``.
            pivot: shared pivot, float64 ``[C]``.
        """
        count = n.sum()
        center = (n * mean).sum(0) / count
        differences = mean - center
        first, second = (n * differences).sum(0), (n * (var + differences.square())).sum(0)
        moments = Moments.from_pivot(count, center, first, second, two_parts=True)
        m = mean - pivot
        q = var + m * m
        sums = ((n * n * s).sum(0) for s in (m, m * m, q, q * q, m * q))
        scatter = SampleMoments(n.new_tensor(float(len(n))), (n * n).sum(), *sums)
        return InputStats(moments, scatter, pivot)

    @staticmethod
    def unpack(vector: Tensor, pivot: Tensor) -> InputStats:
        """Read an all-reduce payload of :meth:`pack`."""
        channels = pivot.numel()
        moments, scatter = vector.split([4 * channels + 1, 5 * channels + 2])
        sums = SampleMoments(scatter[0], scatter[1], *scatter[2:].chunk(5))
        return InputStats(Moments.unpack(moments, channels), sums, pivot)

    def pack(self) -> Tensor:
        """Return the all-reduce payload, float64 ``[9C + 3]``."""
        return torch.cat([self.moments.pack(), *(part.reshape(-1) for part in self.scatter)])

    def __add__(self, other: InputStats) -> InputStats:
        """Return the statistics of both sets; they share the pivot."""
        return InputStats.unpack(self.pack() + other.pack(), self.pivot)


class StatsAccumulator:
    """Accumulator of the inputs of one layer.

    Args:
        pivot: value near the mean, the same on every rank, float64 ``[C]``.
        exact: True for full precision at any mean, in twice the time.
    """

    def __init__(self, pivot: Tensor, exact: bool = True) -> None:
        self._stats = InputStats.zeros(pivot)
        self._exact = exact
        self._buffer: list[SampleStats] = []
        self._buffered = 0

    def add(self, x: Tensor) -> None:
        """Add an input, shape ``[N, C, *]``."""
        if not x.numel():
            return
        # In other memory formats, group norm subtracts large squares from each other.
        fast = not self._exact and x.dim() > 2 and x.is_contiguous()
        self._buffer.append(sample_stats(x, exact=not fast))
        self._buffered += self._buffer[-1].mean.numel()
        if self._buffered > _MAX_BUFFERED:
            self._flush()

    def stats(self) -> InputStats:
        """Return the statistics of all added inputs."""
        self._flush()
        return self._stats

    def has_lost_digits(self) -> bool:
        """Return True if the inputs must be read again by an exact accumulator."""
        if self._exact:
            return False
        moments = self.stats().moments
        return bool((moments.mean().square() > _MAX_FAST_MEAN**2 * moments.variance()).any())

    def _flush(self) -> None:
        if not self._buffer:
            return
        mean = torch.cat([s.exact_mean() for s in self._buffer])
        var = torch.cat([s.var.double() for s in self._buffer])
        n = torch.cat([var.new_full((len(s.mean), 1), s.n) for s in self._buffer])
        self._buffer, self._buffered = [], 0
        self._stats += InputStats.from_samples(n, mean, var, self._stats.pivot)


@dataclass(frozen=True)
class Population:
    """Population estimates for a layer's input, over all ranks. Tensors are float64 ``[C]``.

    Attributes:
        samples: number of samples in the calibration set.
        count: number of values per channel.
        mean_error: standard error of the mean. Samples are the independent draws, not the pixels
            of a sample: the error of a ratio estimator (Cochran, Sampling Techniques, 3rd ed.,
            1977, section 2.11). NaN for one sample.
        var_error: standard error of the variance; NaN for one sample.
        between: variance between the means of samples; NaN for one sample.
    """

    samples: int
    count: int
    mean_error: Tensor
    var_error: Tensor
    between: Tensor


def estimate_population(stats: InputStats) -> Population:
    """Return the population estimates of a layer's input."""
    moments, s = stats.moments, stats.scatter
    mean, var = moments.mean(), moments.variance()
    shift = mean - stats.pivot
    # With d_i = n_i (m_i - mean) and e_i = (sum of squares around the mean) - n_i var.
    dd = s.mm - 2 * shift * s.m + shift.square() * s.squares
    rest = shift.square() - var
    ee = (
        s.qq + 4 * shift.square() * s.mm + rest.square() * s.squares
        - 4 * shift * s.mq + 2 * rest * s.q - 4 * shift * rest * s.m
    )  # fmt: skip
    dd, ee = dd.clamp(min=0), ee.clamp(min=0)
    bessel = s.samples / (s.samples - 1)  # infinite or NaN for one sample
    scale = bessel.sqrt() / moments.count
    return Population(
        samples=int(s.samples.item()),
        count=int(moments.count.item()),
        mean_error=_inf_to_nan(dd.sqrt() * scale),
        var_error=_inf_to_nan(ee.sqrt() * scale),
        between=_inf_to_nan(bessel * dd / s.squares),
    )


def _inf_to_nan(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.nan).cpu()
