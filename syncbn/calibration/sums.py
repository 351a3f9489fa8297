"""Everything that is summed over the inputs of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.calibration.population import Spread
from syncbn.moments import Moments


@dataclass(frozen=True)
class Sums:
    """Sums over a set of samples; sets add.

    Attributes:
        moments: two-part sums of all values.
        spread: of all samples, about the pivot.
        pivot: float64 ``[C]``.
    """

    moments: Moments
    spread: Spread
    pivot: Tensor

    @staticmethod
    def nothing(pivot: Tensor) -> Sums:
        """Return the sums over no samples."""
        channels = pivot.numel()
        return Sums.unpack(pivot.new_zeros(9 * channels + 3), pivot)

    @staticmethod
    def of(n: Tensor, mean: Tensor, var: Tensor, pivot: Tensor) -> Sums:
        """Return the sums over N samples.

        Args:
            n: values a channel, float64 ``[N, 1]``.
            mean: float64 ``[N, C]``.
            var: float64 ``[N, C]``, biased.
            pivot: float64 ``[C]``.
        """
        count = n.sum()
        near = (n * mean).sum(0) / count
        differences = mean - near
        first, second = (n * differences).sum(0), (n * (var + differences.square())).sum(0)
        moments = Moments.from_pivot(count, near, first, second, two_parts=True)
        return Sums(moments, Spread.of(n, mean - pivot, var), pivot)

    @staticmethod
    def unpack(vector: Tensor, pivot: Tensor) -> Sums:
        """Read the message format, ``[9C + 3]``."""
        channels = pivot.numel()
        split = 4 * channels + 1
        moments = Moments.unpack(vector[:split], channels)
        return Sums(moments, Spread.unpack(vector[split:]), pivot)

    def pack(self) -> Tensor:
        """Return the message, float64 ``[9C + 3]``."""
        return torch.cat([self.moments.pack(), self.spread.pack()])

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.moments + other.moments, self.spread.plus(other.spread), self.pivot)
