"""Inputs of a calibration method, and hooks and fixed points that the methods share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from syncbn.calibration.batches import Batches, Forward
from syncbn.calibration.input_stats import InputStats, StatsAccumulator
from syncbn.calibration.ranks import Ranks
from syncbn.nn.bn_layers import BNLayer
from syncbn.nn.module import SyncBatchNorm

# Arguments of this library's layers. Layers of other libraries may use later positions otherwise.
_ARGUMENTS = ("input", "residual", "mask")
_MAX_PASSES = 50
# Roundings of the buffers within which two passes have the same statistics.
_ROUNDINGS = 16


@dataclass(frozen=True)
class CalibrationContext:
    """Arguments of a method, equal on all ranks except for the batches.

    Attributes:
        model: network in inference mode, without communication.
        layers: layers to calibrate.
        pivots: old running means, the same on every rank, float64 ``[C]`` for each layer.
        batches: batches of this rank.
        forward: function that runs a batch through the model.
        ranks: ranks that calibrate together.
        max_bytes: memory limit for suspended passes on this rank; None for no limit.
        report_progress: function called with the finished and the total number of work units.
        report_check: function called with a sentence about the verification of the result.
    """

    model: nn.Module
    layers: list[BNLayer]
    pivots: list[Tensor]
    batches: Batches
    forward: Forward
    ranks: Ranks
    max_bytes: int | None
    report_progress: Callable[[int, int], None]
    report_check: Callable[[str], None]

    def run(self, batch: Any) -> None:
        """Run a batch through the model."""
        self.forward(self.model, batch)

    def make_accumulator(self, layer: BNLayer, exact: bool = True) -> StatsAccumulator:
        """Return an empty accumulator; a fast one is possible if inputs can be read again."""
        return StatsAccumulator(self.pivots[layer.index], exact)

    def reduce_stats(self, layer: BNLayer, accumulator: StatsAccumulator) -> InputStats:
        """Return the statistics over the samples of all ranks; a collective.

        Raises:
            ValueError: some inputs are not finite, or have a single value per channel.
        """
        local = accumulator.stats()
        payload = self.ranks.all_reduce(local.pack(), f"calibration of {layer.name}")
        stats = InputStats.unpack(payload, local.pivot)
        if not bool(payload.isfinite().all()):
            raise ValueError(
                f"{layer.name}: the inputs have NaN or infinite values, or squares beyond float64; "
                "expected finite activations (check the weights, the data, and earlier layers)"
            )
        if stats.moments.count == 1:
            raise ValueError(
                f"{layer.name}: got one value per channel in the whole calibration set, which has "
                "no variance; expected two or more samples"
            )
        return stats


@contextmanager
def hook_inputs(
    layers: Sequence[BNLayer], hook: Callable[[BNLayer, Tensor], None]
) -> Iterator[None]:
    """Call a function before each forward of the layers in the body.

    Args:
        layers: layers to hook.
        hook: function called with a layer and its input ``[N, C, *]``. The layer then normalizes
            with the statistics in its buffers at the function's return.

    Raises:
        ValueError: within the body, if a layer is called with a mask.
    """
    with ExitStack() as stack:
        for layer in layers:
            pre_hook = _make_pre_hook(layer, hook)
            handle = layer.module.register_forward_pre_hook(pre_hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _make_pre_hook(layer: BNLayer, hook: Callable[[BNLayer, Tensor], None]) -> Callable[..., None]:
    def pre_hook(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        if isinstance(module, SyncBatchNorm) and named.get("mask") is not None:
            raise ValueError(
                f"{layer.name}: called with a mask; calibration supports unmasked inputs only"
            )
        # Subclasses of torch's layers may rename the input.
        x: Tensor = named["input"] if "input" in named else next(iter(named.values()))
        hook(layer, x.detach())

    return pre_hook


class LayerInput(NamedTuple):
    """Statistics of a layer's input over all calls in a forward.

    Attributes:
        stats: statistics over the inputs of all calls.
        calls: number of calls in one forward.
    """

    stats: InputStats
    calls: int


LayerInputs = dict[BNLayer, LayerInput]


def add_call(inputs: LayerInputs, layer: BNLayer, stats: InputStats) -> None:
    """Add the statistics of another call of a layer."""
    old = inputs.get(layer)
    inputs[layer] = LayerInput(
        stats if old is None else old.stats + stats, old.calls + 1 if old else 1
    )


def solve_fixed_point(
    run_pass: Callable[[frozenset[BNLayer]], LayerInputs],
) -> dict[BNLayer, InputStats]:
    """Calibrate all layers, with repeated passes for layers that a forward calls several times.

    Later calls depend on the statistics used by earlier ones, so the pooled statistics are a fixed
    point, found by iteration.

    Args:
        run_pass: function that calibrates all layers in order, except the frozen ones passed to
            it, and returns the inputs of all layers.

    Returns:
        Statistics of the inputs of all layers, now set in the layers.
    """
    inputs = run_pass(frozenset())
    order = list(inputs)
    repeated = frozenset(layer for layer, entry in inputs.items() if entry.calls > 1)
    passes = 1
    while repeated:
        for layer in repeated:
            layer.set_moments(inputs[layer].stats.moments)
        old = {
            layer: (layer.running_mean.double(), layer.running_var.double()) for layer in repeated
        }
        inputs = run_pass(repeated)
        passes += 1
        if all(_is_converged(layer, inputs[layer].stats, *old[layer]) for layer in repeated):
            break
        if passes == _MAX_PASSES:
            names = ", ".join(sorted(layer.name for layer in repeated))
            warnings.warn(
                f"{names}: called more than once in a forward, and still changing after {passes} "
                "passes; the statistics are those of the last one",
                stacklevel=2,
            )
            break
    for layer in repeated:
        layer.set_moments(inputs[layer].stats.moments)
    return {layer: inputs[layer].stats for layer in order}


def _is_converged(layer: BNLayer, stats: InputStats, mean: Tensor, var: Tensor) -> bool:
    # In units of var + eps, the layer's divisor, which is not zero for constant channels.
    new_var = stats.moments.variance(unbiased=True)
    scale = new_var + layer.module.eps
    shift = (stats.moments.mean() - mean).abs() / scale.sqrt()
    change = (new_var - var).abs() / scale
    tolerance = _ROUNDINGS * torch.finfo(layer.running_mean.dtype).eps
    return bool(torch.maximum(shift, change).max() <= tolerance)
