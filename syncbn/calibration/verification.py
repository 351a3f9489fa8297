"""The inputs of layers in lockstep, compared with those of passes that run one by one.

Lockstep interleaves the passes of several batches and computes small batches as one. Both change
the inputs of a model that keeps state between its layers, or whose samples depend on each other.
Such a model cannot be recognized by its code, so the statistics of every sample are compared.
"""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from syncbn.calibration.layers import Layer
from syncbn.calibration.per_sample import PerSample, precise

# Roundings of a mean that is far from zero, in units of the mean.
_ROUNDINGS = 32
_MOST_ROWS = 32


class InterferenceError(Exception):
    """A forward whose passes disturb each other when they are interleaved or computed as one.

    Attributes:
        joined: whether small batches were computed as one on a rank.
    """

    joined = False


class Trace:
    """Statistics of samples of a batch at every layer that its pass reaches, in order.

    Args:
        batch: input of the pass.
        start: first sample to record.
        stop: end of the samples to record.
        samples: samples of the pass.

    Attributes:
        batch: as passed.
        entries: layers, and means and variances of at most 32 rows of their inputs.
    """

    def __init__(self, batch: Any, start: int = 0, stop: int = 1, samples: int = 1) -> None:
        self.batch = batch
        self.entries: list[tuple[Layer, PerSample]] = []
        self._start, self._stop, self._samples = start, stop, max(samples, 1)

    def add(self, layer: Layer, x: Tensor) -> None:
        """Record an input, ``[N, C, *]``, of which N is a multiple of the samples."""
        rows = x[len(x) * self._start // self._samples : len(x) * self._stop // self._samples]
        # Not the first ones: in [time, batch, channels], these are all from the start.
        self.entries.append((layer, precise(rows[:: -(-len(rows) // _MOST_ROWS) or 1])))


def largest_difference(together: Trace, alone: Trace, eps: float) -> float:
    """Compare the trace of a batch in lockstep with that of a pass by itself.

    Differences of means are in standard deviations: of the layer, and of the sample about the
    layer's mean. Differences of variances are relative to the square of the same unit. Half of the
    digits must agree, because deep networks amplify the rounding of kernels that depend on the
    batch size.

    Args:
        together: of the batch in lockstep.
        alone: of the same batch.
        eps: machine epsilon of the coarsest dtype in the forward.

    Raises:
        InterferenceError: a difference exceeds the square root of eps, or the layers are others.
    """
    largest = 0.0
    nothing = None, None
    for pair in zip_longest(together.entries, alone.entries, fillvalue=nothing):
        (layer, ours), (other, theirs) = pair
        if layer is None or other is None or layer is not other:
            name = (layer or other).name
            raise InterferenceError(f"{name}: a pass by itself reaches other layers")
        difference = _difference(layer, ours, theirs, eps)
        if not difference <= eps**0.5:
            raise InterferenceError(
                f"{layer.name}: the input differs by {difference:.2g} standard deviations from "
                "that of a pass by itself"
            )
        largest = max(largest, difference)
    return largest


def _difference(layer: Layer, ours: PerSample, theirs: PerSample, eps: float) -> float:
    if ours.mean.shape != theirs.mean.shape:
        return math.inf
    if not ours.mean.numel():
        return 0.0
    ours_mean, mean = (s.mean.double() + s.rest for s in (ours, theirs))
    # The old statistics, which the first comparison uses, may be anything.
    center, var = (
        buffer.double().nan_to_num(0.0, 0.0, 0.0)
        for buffer in (layer.running_mean, layer.running_var)
    )
    square = var.clamp(min=0) + layer.module.eps + theirs.var + (mean - center).square()
    shift = (ours_mean - mean).abs() - _ROUNDINGS * eps * mean.abs()
    change = (ours.var - theirs.var).abs()
    found = torch.maximum(
        torch.where(_equal(ours_mean, mean), 0.0, shift.clamp(min=0) / square.sqrt()),
        torch.where(_equal(ours.var, theirs.var), 0.0, change / square),
    )
    return float(found.nan_to_num(math.inf, math.inf).max())


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())
