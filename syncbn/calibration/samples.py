"""A layer's inputs as they come, sample by sample, on their way into sums.

Every sample is reduced to its own mean and variance per channel at once, while it is in the cache,
and independently of the batch that it came in; the sums over samples are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.calibration.per_sample import PerSample, fast, precise
from syncbn.calibration.sums import Sums

# Statistics of samples that wait to be summed, in numbers.
_MOST_WAITING = 1 << 20
# Means, in standard deviations, up to which the fast way keeps seven digits.
_NEAR = 30


class Samples:
    """Adds up the inputs of a layer.

    Args:
        pivot: float64 ``[C]``, near the mean, the same on every rank.
        precise: take the way that is exact wherever the mean is; twice as long.
    """

    def __init__(self, pivot: Tensor, precise: bool = True) -> None:
        self._sums = Sums.nothing(pivot)
        self._precise = precise
        self._waiting: list[PerSample] = []
        self._numbers = 0

    def add(self, x: Tensor) -> None:
        """Add an input, ``[N, C, *]``."""
        if not x.numel():
            return
        # In other memory layouts, group norm subtracts large squares from each other.
        can_be_fast = not self._precise and x.dim() > 2 and x.is_contiguous()
        self._waiting.append(fast(x) if can_be_fast else precise(x))
        self._numbers += self._waiting[-1].mean.numel()
        if self._numbers > _MOST_WAITING:
            self._flush()

    def sums(self) -> Sums:
        """Return the sums over everything that was added."""
        self._flush()
        return self._sums

    def must_be_precise(self) -> bool:
        """Return whether the fast way was taken and has lost digits."""
        if self._precise:
            return False
        moments = self.sums().moments
        return bool((moments.mean().square() > _NEAR**2 * moments.variance()).any())

    def _flush(self) -> None:
        if not self._waiting:
            return
        mean = torch.cat([s.mean.double() + s.rest for s in self._waiting])
        var = torch.cat([s.var.double() for s in self._waiting])
        n = torch.cat([var.new_full((len(s.mean), 1), s.n) for s in self._waiting])
        self._waiting, self._numbers = [], 0
        self._sums += Sums.of(n, mean, var, self._sums.pivot)
