"""Layers that a forward calls more than once: statistics that agree with themselves.

What such a layer gets in a later call depends on the statistics that it used in an earlier one, so
those of all calls together are a fixed point. It is looked for by repeated passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.calibration.job import Job
from syncbn.calibration.layers import Layer
from syncbn.calibration.sums import Sums


class Input(NamedTuple):
    """What was found about a layer's input.

    Attributes:
        sums: over the inputs of all calls.
        calls: in one forward.
    """

    sums: Sums
    calls: int


Found = dict[Layer, Input]

_MOST_PASSES = 50
# Of the buffers, within which two passes are the same.
_ROUNDINGS = 16


def settle(job: Job, one_pass: Callable[[frozenset[Layer]], Found]) -> dict[Layer, Sums]:
    """Return the sums over the inputs of all layers, which then use them.

    Args:
        job: the calibration.
        one_pass: calibrates all layers one after another but some, which keep what they use.
    """
    found = one_pass(frozenset())
    order = list(found)
    reused = frozenset(layer for layer, input in found.items() if input.calls > 1)
    passes = 1
    while reused:
        for layer in reused:
            layer.use_moments(found[layer].sums.moments)
        before = {layer: _read(layer) for layer in reused}
        found = one_pass(reused)
        passes += 1
        if all(_is_near(layer, found[layer].sums, *before[layer]) for layer in reused):
            break
        if passes == _MOST_PASSES:
            names = ", ".join(sorted(layer.name for layer in reused))
            warnings.warn(
                f"{names}: called more than once in a forward, and still changing after {passes} "
                "passes; the statistics are those of the last one",
                stacklevel=2,
            )
            break
    for layer in reused:
        layer.use_moments(found[layer].sums.moments)
    return {layer: found[layer].sums for layer in order}


def add_call(found: Found, layer: Layer, sums: Sums) -> None:
    """Add the sums over the inputs of a call to those of the calls before it."""
    before = found.get(layer)
    found[layer] = Input(sums, 1) if before is None else Input(before.sums + sums, before.calls + 1)


def _read(layer: Layer) -> tuple[Tensor, Tensor]:
    return layer.running_mean.double(), layer.running_var.double()


def _is_near(layer: Layer, sums: Sums, mean: Tensor, var: Tensor) -> bool:
    # By what the layer divides by, which is not zero where a channel is constant.
    scale = sums.moments.variance(unbiased=True) + layer.module.eps
    shift = (sums.moments.mean() - mean).abs() / scale.sqrt()
    change = (sums.moments.variance(unbiased=True) - var).abs() / scale
    tolerance = _ROUNDINGS * torch.finfo(layer.running_mean.dtype).eps
    return bool(torch.maximum(shift, change).max() <= tolerance)
