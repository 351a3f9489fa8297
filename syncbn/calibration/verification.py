"""Comparison of lockstep's layer inputs with single passes, which run one after another.

Lockstep interleaves the passes of several batches and coalesces small batches. Both change layer
inputs if a model keeps state between its layers, or if its samples depend on each other. Code
analysis cannot recognize all such models, so the statistics of samples are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn.calibration.batches import copy_batch
from syncbn.calibration.context import CalibrationContext, hook_inputs
from syncbn.nn.bn_layers import BNLayer
from syncbn.nn.sample_stats import SampleStats, sample_stats

#: Number of passes that are traced. One is not enough: it may fill a cache that the second uses.
TRACED_PASSES = 2
# Allowance for the mean of coalesced batches far from zero, in roundings of the mean.
_ROUNDINGS = 32
# A repeated pass runs the same kernels on the same shapes: no difference was measured on CPU.
# Atomic additions on CUDA round in any order, hence 64 roundings; half precision has a lower limit,
# at which interference of 1 % is still found.
_MAX_REPEATED_ROUNDINGS, _MAX_REPEATED_DIFFERENCE = 64, 2.0**-8
_MAX_ROWS = 32


class InterferenceError(Exception):
    """Interleaved or coalesced passes have other layer inputs than single passes.

    Attributes:
        coalesced: True if a rank has coalesced small batches.
    """

    def __init__(self, reason: str, coalesced: bool = False) -> None:
        super().__init__(reason)
        self.coalesced = coalesced


class Trace:
    """Statistics of a batch's samples at every layer of its pass, in order.

    Args:
        batch: batch for a single pass.
        start: first sample of the batch in the traced pass.
        stop: end of the batch in the traced pass; None if the pass has this batch only.
        samples: number of samples in the traced pass; None likewise.

    Attributes:
        batch: batch for a single pass.
        entries: layers, and statistics of at most 32 rows of their inputs.
    """

    def __init__(
        self, batch: Any, start: int = 0, stop: int | None = None, samples: int | None = None
    ) -> None:
        self.batch = batch
        self.entries: list[tuple[BNLayer, SampleStats]] = []
        self._start, self._stop, self._samples = start, stop, samples

    @property
    def is_coalesced(self) -> bool:
        """True if the traced pass has several batches."""
        return self._stop is not None

    def add(self, layer: BNLayer, x: Tensor) -> None:
        """Record an input, ``[N, C, *]``, where N is a multiple of the samples."""
        if self._stop is not None and self._samples:
            x = x[len(x) * self._start // self._samples : len(x) * self._stop // self._samples]
        # Evenly spaced rows: the first rows of [time, batch, channels] are all of the first step.
        self.entries.append((layer, sample_stats(x[:: -(-len(x) // _MAX_ROWS) or 1])))


def make_traces(group: list[Any]) -> list[Trace]:
    """Return empty traces of the first and the last batch of a pass, or of its only batch."""
    if len(group) == 1:
        return [Trace(copy_batch(group[0]))]
    samples = sum(len(part) for part in group)
    return [
        Trace(copy_batch(group[0]), 0, len(group[0]), samples),
        Trace(copy_batch(group[-1]), samples - len(group[-1]), samples, samples),
    ]


def compare_with_single_passes(
    context: CalibrationContext,
    traces: Sequence[list[Trace]],
    eps: float,
    seed: Callable[[int, int], None],
) -> float:
    """Return the largest difference between traced batches and single passes.

    Args:
        context: inputs of the calibration.
        traces: traces of each traced pass.
        eps: machine epsilon of the coarsest dtype in the forward.
        seed: function that seeds random numbers for a pass and its number of layers so far.

    Raises:
        InterferenceError: a difference exceeds its bound, or the layers differ.
    """
    largest = 0.0
    # A causal forward cannot show interference in the first batch, nor a reversed one in the last.
    for number, trace in ((0, traces[0][0]), (len(traces) - 1, traces[-1][-1])):
        single = Trace(trace.batch)

        def record(layer: BNLayer, x: Tensor, single: Trace = single, number: int = number) -> None:
            single.add(layer, x)
            seed(number, len(single.entries))

        seed(number, 0)
        with hook_inputs(context.layers, record):
            context.run(trace.batch)
        largest = max(largest, _largest_difference(trace, single, eps))
    return largest


def _largest_difference(traced: Trace, single: Trace, eps: float) -> float:
    """Return the largest difference between a batch in lockstep and in a single pass.

    The unit of a mean is a standard deviation, ``unit^2 = running_var + sample_var + (sample_mean -
    running_mean)^2``, with the new statistics. The unit of a variance is ``unit^2``. A mean of
    coalesced batches may also differ by 32 of its roundings.

    Coalesced batches run other kernels, and deep networks amplify their rounding. So their bound is
    half of the digits. Measured on CPU, in units of the bound: at most 0.08 for residual networks
    of 110 layers and plain ones of 40; 1.3 for 30 linear layers without shortcuts, whose batches
    are then not coalesced. The bound of repeated passes is a few roundings.
    """
    largest = 0.0
    bound = min(_MAX_REPEATED_ROUNDINGS * eps, _MAX_REPEATED_DIFFERENCE)
    rounding = 0.0
    if traced.is_coalesced:
        bound, rounding = eps**0.5, _ROUNDINGS * eps
    for (layer, ours), (other, theirs) in zip(traced.entries, single.entries, strict=False):
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
    calls = len(traced.entries), len(single.entries)
    if calls[0] != calls[1]:
        raise InterferenceError(
            f"the forward reaches {calls[0]} layers; a single pass reaches {calls[1]}"
        )
    return largest


def _difference(layer: BNLayer, ours: SampleStats, theirs: SampleStats, rounding: float) -> float:
    if ours.mean.shape != theirs.mean.shape:
        return math.inf
    if not ours.mean.numel():
        return 0.0
    our_mean, mean = ours.exact_mean(), theirs.exact_mean()
    square = layer.running_var.double() + theirs.var
    square = square + (mean - layer.running_mean.double()).square()
    noise = rounding * mean.abs()
    shift = _excess(our_mean, mean, noise, square.sqrt())
    change = _excess(ours.var.double(), theirs.var.double(), noise.square(), square)
    return float(torch.maximum(shift, change).max())


def _excess(ours: Tensor, theirs: Tensor, noise: Tensor, unit: Tensor) -> Tensor:
    """Return differences beyond noise; infinite if only one of two values is NaN."""
    difference = (ours - theirs).abs()
    # A constant channel has no unit.
    equal = (difference <= noise) | (ours == theirs) | (ours.isnan() & theirs.isnan())
    return ((difference - noise) / unit).nan_to_num(math.inf, math.inf).masked_fill(equal, 0.0)
