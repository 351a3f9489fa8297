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

from syncbn.calibration.batches import copy
from syncbn.calibration.layers import Layer
from syncbn.calibration.per_sample import PerSample, precise

# Roundings of a mean that is far from zero, in units of the mean.
_ROUNDINGS = 32
# A repeated pass runs the same kernels on the same shapes: no difference was measured on CPU.
# Atomic additions on CUDA round in any order, hence 64 roundings; half precision has a lower limit,
# at which interference of 1 % is still found.
_REPEATED_ROUNDINGS, _REPEATED_MOST = 64, 2.0**-8
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

    @property
    def joined(self) -> bool:
        """True if the recorded pass has other batches, too."""
        return self._stop is not None

    def add(self, layer: Layer, x: Tensor) -> None:
        """Record an input, ``[N, C, *]``, of which N is a multiple of the samples."""
        if self._stop is not None and self._samples:
            x = x[len(x) * self._start // self._samples : len(x) * self._stop // self._samples]
        # Evenly spread: the first rows of [time, batch, channels] are all of the first step.
        self.entries.append((layer, precise(x[:: -(-len(x) // _MOST_ROWS) or 1])))


def trace_parts(group: list[Any]) -> list[Trace]:
    """Return empty traces of the first and the last batch of a pass, or of its only batch."""
    if len(group) == 1:
        return [Trace(copy(group[0]))]
    samples = sum(len(part) for part in group)
    return [
        Trace(copy(group[0]), 0, len(group[0]), samples),
        Trace(copy(group[-1]), samples - len(group[-1]), samples, samples),
    ]


def largest_difference(together: Trace, alone: Trace, eps: float) -> float:
    """Return the largest difference between a batch in lockstep and in a single pass.

    The unit of a mean is a standard deviation, ``unit^2 = running_var + sample_var + (sample_mean -
    running_mean)^2``, with the new statistics. The unit of a variance is ``unit^2``. A mean of
    joined batches may differ by 32 of its roundings, too.

    Joined batches run other kernels, and deep networks amplify their rounding. So their bound is
    half of the digits. Measured on CPU, in units of the bound: at most 0.08 for residual networks
    of 110 layers and plain ones of 40; 1.3 for 30 linear layers without shortcuts, whose batches
    are then not joined. The bound of repeated passes is a few roundings.

    Args:
        together: trace of the batch in lockstep.
        alone: trace of the same batch in a single pass.
        eps: machine epsilon of the coarsest dtype in the forward.

    Raises:
        InterferenceError: a difference exceeds its bound, or the layers differ.
    """
    largest = 0.0
    bound = eps**0.5 if together.joined else min(_REPEATED_ROUNDINGS * eps, _REPEATED_MOST)
    rounding = _ROUNDINGS * eps if together.joined else 0.0
    for (layer, ours), (other, theirs) in zip(together.entries, alone.entries, strict=False):
        if layer is not other:
            raise InterferenceError(f"{layer.name}: a single pass reaches {other.name} instead")
        difference = _difference(layer, ours, theirs, rounding)
        if not difference <= bound:
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


def _difference(layer: Layer, ours: PerSample, theirs: PerSample, rounding: float) -> float:
    if ours.mean.shape != theirs.mean.shape:
        return math.inf
    if not ours.mean.numel():
        return 0.0
    ours_mean, mean = (s.mean.double() + s.rest for s in (ours, theirs))
    center, var = layer.running_mean.double(), layer.running_var.double()
    square = var + theirs.var + (mean - center).square()
    noise = rounding * mean.abs()
    shift = _excess(ours_mean, mean, noise, square.sqrt())
    change = _excess(ours.var.double(), theirs.var.double(), noise.square(), square)
    return float(torch.maximum(shift, change).max())


def _excess(ours: Tensor, theirs: Tensor, noise: Tensor, unit: Tensor) -> Tensor:
    """Return differences beyond noise; infinite if only one of two values is a number."""
    difference = (ours - theirs).abs()
    # A constant channel has no unit.
    equal = (difference <= noise) | (ours == theirs) | (ours.isnan() & theirs.isnan())
    return ((difference - noise) / unit).nan_to_num(math.inf, math.inf).masked_fill(equal, 0.0)
