"""Exponential moving averages, as training leaves them: the old ones, moved by every batch.

A layer's ``momentum`` is that of its training; None averages all batches, and forgets the old.
Batches come in the order of the ranks, those of a rank in their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.calibration.job import Job
from syncbn.calibration.layers import Layer, old_statistics
from syncbn.calibration.onepass import one_pass, stacked, unbiased
from syncbn.calibration.sums import Sums
from syncbn.moments import Moments


def ema(job: Job) -> dict[Layer, Sums]:
    """Return the sums over the inputs of every layer that was reached; the layers use averages.

    Raises:
        ValueError: there are no batches; a batch has one value a channel; NaN.
    """
    old = [stacked(mean.double(), var.double()) for mean, var in old_statistics(job.layers)]
    updates = [_Updates(layer, start) for layer, start in zip(job.layers, old, strict=True)]
    found = one_pass(job, lambda layer, moments: updates[layer.index].add(moments))
    for layer in found:
        running = old[layer.index]
        batches = 0.0
        for row in job.ranks.gather(updates[layer.index].pack()):
            number, kept, moved = row[0].item(), row[1], row[2:].view_as(running)
            if layer.module.momentum is None and number:
                kept = batches / (batches + number)
                moved = moved * (number / (batches + number))
            running = kept * running + moved if number else running
            batches += number
        layer.use(*running)
    return found


class _Updates:
    """The batches of this rank as one step: ``running <- kept * running + moved``."""

    def __init__(self, layer: Layer, like: Tensor) -> None:
        self._layer = layer
        self._batches = 0
        self._kept = 1.0
        self._moved = like.new_zeros(like.shape)

    def add(self, moments: Moments) -> None:
        self._batches += 1
        momentum = self._layer.module.momentum
        if momentum is None:
            momentum = 1 / self._batches
        batch = stacked(moments.mean(), unbiased(self._layer, moments))
        self._kept *= 1 - momentum
        self._moved = (1 - momentum) * self._moved + momentum * batch

    def pack(self) -> Tensor:
        """Return ``[number of batches, kept, moved]``, ``[2C + 2]``."""
        numbers = self._moved.new_tensor([self._batches, self._kept])
        return torch.cat([numbers, self._moved.flatten()])
