"""What calibration finds out about a layer's input: its population, and how well that is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.moments import Moments


class Spread(NamedTuple):
    """How the samples of a set differ from each other, per channel; sets add.

    Sample i has n_i values a channel, of mean m_i and mean square q_i about a pivot that all sets
    share. All members are float64: scalars, then ``[C]``.

    Attributes:
        samples: how many.
        squares: sum of n_i^2.
        m: sum of n_i^2 m_i.
        mm: sum of n_i^2 m_i^2.
        q: sum of n_i^2 q_i.
        qq: sum of n_i^2 q_i^2.
        mq: sum of n_i^2 m_i q_i.
    """

    samples: Tensor
    squares: Tensor
    m: Tensor
    mm: Tensor
    q: Tensor
    qq: Tensor
    mq: Tensor

    @staticmethod
    def of(n: Tensor, m: Tensor, var: Tensor) -> Spread:
        """Return the spread of N samples.

        Args:
            n: values a channel, float64 ``[N, 1]``.
            m: means, less the pivot, float64 ``[N, C]``.
            var: biased variances, float64 ``[N, C]``.
        """
        q = var + m * m
        sums = ((n * n * s).sum(0) for s in (m, m * m, q, q * q, m * q))
        return Spread(n.new_tensor(float(len(n))), (n * n).sum(), *sums)

    @staticmethod
    def unpack(vector: Tensor) -> Spread:
        """Read the message format, ``[5C + 2]``."""
        return Spread(vector[0], vector[1], *vector[2:].chunk(5))

    def pack(self) -> Tensor:
        """Return the message: the members one after another, float64 ``[5C + 2]``."""
        return torch.cat([part.reshape(-1) for part in self])

    def plus(self, other: Spread) -> Spread:
        """Return the spread of both sets together."""
        return Spread(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Population:
    """What a calibration set says about a layer's input; all ranks, ``[C]`` are float64.

    Attributes:
        samples: in the set.
        count: values per channel in the set.
        mean_error: standard error of the mean, ``[C]``. Samples are what was drawn independently,
            not the pixels of one: the error of a ratio estimator (Cochran, Sampling Techniques,
            3rd ed., 1977, section 2.11). NaN for one sample.
        var_error: standard error of the variance, ``[C]``, likewise.
        between: variance of the samples' own means, ``[C]``.
    """

    samples: int
    count: int
    mean_error: Tensor
    var_error: Tensor
    between: Tensor

    @staticmethod
    def of(moments: Moments, spread: Spread, pivot: Tensor) -> Population:
        """Return what the moments of all values and the spread of all samples say."""
        mean, var = moments.mean(), moments.variance()
        shift = mean - pivot
        # With d_i = n_i (m_i - mean) and e_i = (sum of squares about the mean) - n_i var.
        dd = spread.mm - 2 * shift * spread.m + shift.square() * spread.squares
        rest = shift.square() - var
        ee = (
            spread.qq + 4 * shift.square() * spread.mm + rest.square() * spread.squares
            - 4 * shift * spread.mq + 2 * rest * spread.q - 4 * shift * rest * spread.m
        )  # fmt: skip
        dd, ee = dd.clamp(min=0), ee.clamp(min=0)
        bessel = spread.samples / (spread.samples - 1)  # inf and NaN for one sample
        scale = bessel.sqrt() / moments.count
        return Population(
            samples=int(spread.samples.item()),
            count=int(moments.count.item()),
            mean_error=_undefined_as_nan(dd.sqrt() * scale),
            var_error=_undefined_as_nan(ee.sqrt() * scale),
            between=_undefined_as_nan(bessel * dd / spread.squares),
        )


def _undefined_as_nan(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.nan).cpu()
