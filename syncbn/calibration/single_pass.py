"""Methods that normalize each batch with its own statistics, as in training: one pass.

Statistics of later layers depend on the batch size, through the outputs of earlier layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from syncbn.calibration.context import CalibrationContext, Results, hook_inputs
from syncbn.kernels import select_kernel
from syncbn.moments import Moments
from syncbn.nn.bn_layers import BNLayer, clone_running_stats


def calibrate_pooled(context: CalibrationContext) -> Results:
    """Pool the statistics of all batches of all ranks exactly (law of total variance).

    This is "precise BN" with exact pooling.

    Raises:
        ValueError: no batches; non-finite inputs.
    """
    results = _run_batches(context, lambda layer, moments: None)
    for layer, stats in results.items():
        layer.set_moments(stats.moments)
    return results


def calibrate_average(context: CalibrationContext) -> Results:
    """Average the mean and the unbiased variance over batches.

    The formula of Ioffe and Szegedy (2015), algorithm 2: mean = E[mean_B], var = m/(m-1) E[var_B].
    It omits the variance between the means of batches.

    Raises:
        ValueError: no batches; a batch with one value per channel; non-finite inputs.
    """
    return _average_batches(context, [None] * len(context.layers))


def calibrate_ema(context: CalibrationContext) -> Results:
    """Update the old statistics by an exponential moving average, as in training.

    The momentum is the layer's; None averages all batches and drops the old statistics. Batches
    are ordered by rank.

    Raises:
        ValueError: no batches; a batch with one value per channel; non-finite inputs.
    """
    return _average_batches(context, [layer.module.momentum for layer in context.layers])


def _average_batches(context: CalibrationContext, momenta: list[float | None]) -> Results:
    """Set averages of the statistics of batches.

    Args:
        context: inputs of the calibration.
        momenta: momentum of each layer; None for the average of all batches.
    """
    old = clone_running_stats(context.layers)
    numbers = [0] * len(old)
    # The batches of this rank as one step, running <- (1 - momentum)^number * running + update; a
    # plain sum without a momentum.
    updates = [pivot.new_zeros(2, len(pivot)) for pivot in context.pivots]

    def add_batch(layer: BNLayer, moments: Moments) -> None:
        if bool(moments.count < 2):
            raise ValueError(
                f"{layer.name}: got a batch with one value per channel, which has no variance to "
                "average; expected batches of two or more (method 'lockstep' accepts any)"
            )
        index, momentum = layer.index, momenta[layer.index]
        stats = torch.stack([moments.mean(), moments.variance(unbiased=True)])
        numbers[index] += 1
        if momentum is None:
            updates[index] += stats
        else:
            updates[index].lerp_(stats, momentum)

    results = _run_batches(context, add_batch)
    local = numbers, [update.cpu() for update in updates]
    ranks = context.ranks.all_gather_object(local)
    for layer in results:
        steps = [(n[layer.index], updates[layer.index]) for n, updates in ranks]
        momentum = momenta[layer.index]
        if momentum is None:
            stats = sum((update for _, update in steps), torch.zeros(())) / sum(n for n, _ in steps)
        else:
            _, *parts = old[layer.index]
            stats = torch.stack(parts).double().cpu()
            for number, update in steps:
                stats = (1 - momentum) ** number * stats + update
        layer.set_running_stats(*stats)
    return results


def _run_batches(
    context: CalibrationContext, add_batch: Callable[[BNLayer, Moments], None]
) -> Results:
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
    return {layer: stats for layer, stats in results.items() if stats.samples > 0}
