"""Statistics of a layer's input: reduced per sample, summed, with standard errors.

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

# Longer float32 sums of squares lose digits in torch.linalg.vector_norm.
_MAX_NORM_LENGTH = 4096
# Per-sample values that are buffered before they are summed.
_MAX_BUFFERED = 1 << 20
# Largest mean, in standard deviations, for seven digits of the variance from group norm.
_MAX_FAST_MEAN = 30


class SampleStats(NamedTuple):
    """Statistics of N samples, shape ``[N, C]``, in the precision of the input or float32.

    Attributes:
        n: number of values per channel in each sample.
        mean: rounded mean.
        var: biased variance, float64.
        rest: rounding error of the mean, float64.
    """

    n: int
    mean: Tensor
    var: Tensor
    rest: Tensor | float = 0.0

    def exact_mean(self) -> Tensor:
        """Return the mean with its rounding error added, float64 ``[N, C]``."""
        return self.mean.double() + self.rest


def sample_stats(x: Tensor, exact: bool = True) -> SampleStats:
    """Return the statistics of each sample of an input.

    Args:
        x: input, shape ``[N, C, *]``; contiguous if not exact.
        exact: True for full precision at any mean. False for one read of the input, seven digits
            of the variance for means up to 30 standard deviations, and no gradient.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not exact:
        # Group norm with a group per channel is ATen's fastest source of moments, on CPU and CUDA.
        samples, channels = x.shape[:2]
        n = x[0, 0].numel()
        _, mean, invstd = torch.native_group_norm(
            x.to(dtype), None, None, samples, channels, n, channels, 0.0
        )
        return SampleStats(n, mean, invstd.double().pow_(-2))
    if x.dim() == 2:
        # A copy: the forward may overwrite the input before these statistics are read.
        mean = x.to(dtype, copy=True)
        return SampleStats(1, mean, torch.zeros_like(mean))
    values = x.flatten(2)
    n = values.shape[2]
    mean = values.mean(2, dtype=dtype)
    differences = values - mean.unsqueeze(2)
    rest = differences.mean(2).double()
    if n <= _MAX_NORM_LENGTH:
        squares = torch.linalg.vector_norm(differences, dim=2).double().square()
    else:
        squares = differences.square_().sum(2).double()
    return SampleStats(n, mean, squares / n - rest * rest, rest)


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
