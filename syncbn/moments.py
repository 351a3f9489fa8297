"""The statistic everything is built on: how many values, their sum, their sum of squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Relative rounding of a raw float64 sum of squares after a few additions (a unit is 1.1e-16).
ROUNDING = 1e-15


@dataclass(frozen=True)
class Moments:
    """Per-channel raw moments of a set of values; sets add, so ranks and batches combine exactly.

    Raw sums are used because they add in one all-reduce whose size does not depend on the number
    of ranks. They are float64 because raw float32 sums lose the variance to cancellation (7 % of
    it at mean/std = 1000): in float64 the relative error of the variance is about
    1e-16 (mean/std)^2, and counts are exact up to 2^53. Sending (mean, invstd, count) of every rank
    instead grows with the world size and recovers small variances through eps.

    Attributes:
        count: values per channel, float64 scalar tensor. May be zero.
        sum: sum of the values, float64, shape ``[C]``.
        sum_sq: sum of the squared values, float64, shape ``[C]``.
    """

    count: Tensor
    sum: Tensor
    sum_sq: Tensor

    @staticmethod
    def unpack(vector: Tensor) -> Moments:
        """Read the message format: ``[sum (C) | sum_sq (C) | count (1)]``, shape ``[2C + 1]``."""
        channels = vector.numel() // 2
        return Moments(vector[-1], vector[:channels], vector[channels:-1])

    def pack(self) -> Tensor:
        """Return the message ``[sum (C) | sum_sq (C) | count (1)]``, float64 ``[2C + 1]``."""
        return torch.cat([self.sum, self.sum_sq, self.count.reshape(1)])

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum + other.sum, self.sum_sq + other.sum_sq)

    def mean(self) -> Tensor:
        """Return the mean, float64, shape ``[C]``; zero where there are no values."""
        return self.sum / self.count.clamp(min=1)

    def variance(self, *, unbiased: bool = False) -> Tensor:
        """Return the variance, float64, shape ``[C]``; zero where it is undefined.

        Args:
            unbiased: divide by ``count - 1`` (running statistics) instead of ``count``
                (normalization).
        """
        squares = self.sum_sq - self.sum * self.mean()
        # What is within the rounding of the sums is zero: a constant channel of value v would
        # otherwise have a variance of up to 1e-15 v^2, which is far above eps for v = 1e6.
        squares = squares * (squares > ROUNDING * self.sum_sq)
        return squares / (self.count - 1 if unbiased else self.count).clamp(min=1)
