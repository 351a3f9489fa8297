"""Methods that normalize each batch with its own statistics, as in training: one pass.

Statistics of later layers depend on the batch size, through the outputs of earlier layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from syncbn.calibration.context import CalibrationContext, hook_inputs
from syncbn.calibration.input_stats import InputStats
from syncbn.kernels import select_kernel
from syncbn.moments import Moments
from syncbn.nn.bn_layers import BNLayer, clone_running_stats


def calibrate_pooled(context: CalibrationContext) -> dict[BNLayer, InputStats]:
    """Pool the statistics of all batches of all ranks exactly (law of total variance).

    This is "precise BN" with exact pooling.

    Raises:
        ValueError: no batches; non-finite inputs.
    """
    results = run_single_pass(context)
    for layer, stats in results.items():
        layer.set_moments(stats.moments)
    return results


def calibrate_average(context: CalibrationContext) -> dict[BNLayer, InputStats]:
    """Average the mean and the unbiased variance over batches.

    The formula of Ioffe and Szegedy (2015), algorithm 2: mean = E[mean_B], var = m/(m-1) E[var_B].
    It omits the variance between the means of batches.

    Raises:
        ValueError: no batches; a batch with one value per channel; non-finite inputs.
    """
    totals = [pivot.new_zeros(2 * len(pivot) + 1) for pivot in context.pivots]

    def add_batch(layer: BNLayer, moments: Moments) -> None:
        totals[layer.index][:-1] += _batch_stats(layer, moments).flatten()
        totals[layer.index][-1] += 1

    results = run_single_pass(context, add_batch)
    for layer in results:
        total = context.ranks.all_reduce(totals[layer.index], f"calibration of {layer.name}")
        layer.set_running_stats(*(total[:-1] / total[-1]).chunk(2))
    return results


def calibrate_ema(context: CalibrationContext) -> dict[BNLayer, InputStats]:
    """Update the old statistics by an exponential moving average, as in training.

    The momentum is the layer's; None averages all batches and drops the old statistics. Batches
    are ordered by rank.

    Raises:
        ValueError: no batches; a batch with one value per channel; non-finite inputs.
    """
    running = [
        torch.stack([mean.double(), var.double()])
        for _, mean, var in clone_running_stats(context.layers)
    ]
    updates = [_MovingAverage(layer.module.momentum) for layer in context.layers]

    def add_batch(layer: BNLayer, moments: Moments) -> None:
        updates[layer.index].add(_batch_stats(layer, moments))

    results = run_single_pass(context, add_batch)
    ranks = context.ranks.all_gather_object([update.state() for update in updates])
    for layer in results:
        stats, total = running[layer.index], 0
        for number, decay, update in (states[layer.index] for states in ranks):
            if number:
                if layer.module.momentum is None:
                    decay, update = total / (total + number), update * (number / (total + number))
                stats = decay * stats + update.to(stats.device)
                total += number
        layer.set_running_stats(*stats)
    return results


class _MovingAverage:
    """Batches of this rank as one step: ``running <- decay * running + update``."""

    def __init__(self, momentum: float | None) -> None:
        self._momentum = momentum
        self._batches = 0
        self._decay = 1.0
        self._update = torch.zeros(())

    def add(self, stats: Tensor) -> None:
        self._batches += 1
        momentum = 1 / self._batches if self._momentum is None else self._momentum
        self._decay *= 1 - momentum
        self._update = (1 - momentum) * self._update.to(stats) + momentum * stats

    def state(self) -> tuple[int, float, Tensor]:
        return self._batches, self._decay, self._update.cpu()


def run_single_pass(
    context: CalibrationContext,
    add_batch: Callable[[BNLayer, Moments], None] = lambda layer, moments: None,
) -> dict[BNLayer, InputStats]:
    """Return the input statistics of every layer that was reached on any rank.

    Layers normalize with the statistics of this rank's batch. No communication happens before the
    end, so ranks may have different numbers of batches.

    Args:
        context: inputs of the calibration.
        add_batch: function called with a layer and the moments of its input, shape ``[C]``.

    Raises:
        ValueError: no batches; non-finite inputs.
    """
    accumulators = [context.make_accumulator(layer) for layer in context.layers]

    def hook(layer: BNLayer, x: Tensor) -> None:
        if x.numel():
            accumulators[layer.index].add(x)
            moments = Moments.unpack(select_kernel("auto", x).moments(x), layer.channels)
            add_batch(layer, moments)
            layer.set_moments(moments, unbiased=False)

    def run() -> int:
        number = 0
        with hook_inputs(context.layers, hook):
            for batch in context.batches:
                context.run(batch)
                number += 1
                context.report_progress(number, max(number, len(context.batches)))
        return number

    if not any(context.ranks.all_gather_result(run)):
        raise ValueError("got no batches on any rank; expected at least one")
    results = {
        layer: context.reduce_stats(layer, accumulators[layer.index]) for layer in context.layers
    }
    return {layer: stats for layer, stats in results.items() if stats.scatter.samples > 0}


def _batch_stats(layer: BNLayer, moments: Moments) -> Tensor:
    """Return the mean and the unbiased variance of a batch, shape ``[2, C]``.

    Raises:
        ValueError: the batch has one value per channel.
    """
    if bool(moments.count < 2):
        raise ValueError(
            f"{layer.name}: got a batch with one value per channel, which has no variance to "
            "average; expected batches of two or more (method 'lockstep' accepts any)"
        )
    return torch.stack([moments.mean(), moments.variance(unbiased=True)])
