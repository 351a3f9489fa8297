"""Comparison of lockstep's layer inputs with single passes, which run one after another.

Lockstep interleaves the passes of several batches and computes small batches as one. Both change
layer inputs if a model keeps state between its layers, or if its samples depend on each other.
Code analysis cannot recognize all such models, so the statistics of samples are compared.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from syncbn.calibration.layers import Layer
from syncbn.calibration.per_sample import PerSample, precise

# Roundings of a mean that is far from zero, in units of the mean.
_ROUNDINGS = 32
_MOST_ROWS = 32


class InterferenceError(Exception):
    """Interleaved or joined passes have other layer inputs than single passes.

    Attributes:
        joined: True if some rank has computed small batches as one.
    """

    joined = False


class Trace:
    """Statistics of samples of a batch at every layer that its pass reaches, in order.

    Args:
        batch: input of a single pass.
        start: first sample of the batch in the recorded pass.
        stop: end of the batch in the recorded pass; None if it has this batch only.
        samples: number of samples in the recorded pass; None likewise.

    Attributes:
        batch: input of a single pass.
        entries: layers, and means and variances of at most 32 rows of their inputs.
    """

    def __init__(
        self, batch: Any, start: int = 0, stop: int | None = None, samples: int | None = None
    ) -> None:
        self.batch = batch
        self.entries: list[tuple[Layer, PerSample]] = []
        self._start, self._stop, self._samples = start, stop, samples

    def add(self, layer: Layer, x: Tensor) -> None:
        """Record an input, ``[N, C, *]``, of which N is a multiple of the samples."""
        if self._stop is not None and self._samples:
            x = x[len(x) * self._start // self._samples : len(x) * self._stop // self._samples]
        # Evenly spread: the first rows of [time, batch, channels] are all of the first step.
        self.entries.append((layer, precise(x[:: -(-len(x) // _MOST_ROWS) or 1])))


def largest_difference(together: Trace, alone: Trace, eps: float) -> float:
    """Return the largest difference between a batch in lockstep and in a single pass.

    The unit of a mean is a standard deviation: ``unit^2 = running_var + eps + sample_var +
    (sample_mean - running_mean)^2``. The unit of a variance is ``unit^2``. The bound is half of the
    digits, because deep networks amplify the rounding of kernels that depend on the batch size.
    Measured on CPU, in units of the bound: at most 0.08 for residual networks of 110 layers and
    plain ones of 40; 1.3 for 30 linear layers without shortcuts, whose batches are then not joined.

    Args:
        together: trace of the batch in lockstep.
        alone: trace of the same batch in a single pass.
        eps: machine epsilon of the coarsest dtype in the forward.

    Raises:
        InterferenceError: a difference exceeds the square root of eps, or the layers differ.
    """
    largest = 0.0
    for (layer, ours), (other, theirs) in zip(together.entries, alone.entries, strict=False):
        if layer is not other:
            raise InterferenceError(f"{layer.name}: a single pass reaches {other.name} instead")
        difference = _difference(layer, ours, theirs, eps)
        if not difference <= eps**0.5:
            raise InterferenceError(
                f"{layer.name}: the input differs from a single pass by {difference:.2g} "
                "standard deviations; the forward keeps state between layers, or samples depend on "
                "each other"
            )
        largest = max(largest, difference)
    calls = len(together.entries), len(alone.entries)
    if calls[0] != calls[1]:
        raise InterferenceError(
            f"the forward reaches {calls[0]} layers; a single pass reaches {calls[1]}"
        )
    return largest


def _difference(layer: Layer, ours: PerSample, theirs: PerSample, eps: float) -> float:
    if ours.mean.shape != theirs.mean.shape:
        return math.inf
    if not ours.mean.numel():
        return 0.0
    ours_mean, mean = (s.mean.double() + s.rest for s in (ours, theirs))
    # Old statistics, before calibration, may be NaN.
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
