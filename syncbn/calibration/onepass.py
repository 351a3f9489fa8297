"""A pass in which every batch is normalized with its own statistics, as in training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from syncbn.calibration.intercept import intercepted
from syncbn.calibration.job import Job
from syncbn.calibration.layers import Layer
from syncbn.calibration.sums import Sums
from syncbn.kernels import select_kernel
from syncbn.moments import Moments


def one_pass(
    job: Job, observe: Callable[[Layer, Moments], None] = lambda layer, moments: None
) -> dict[Layer, Sums]:
    """Return the sums over the inputs of every layer that was reached on any rank.

    The layers normalize with the statistics of this rank's batch: nothing is communicated before
    the end, so ranks may have different numbers of batches.

    Args:
        job: the calibration.
        observe: called with the moments of each input, before the layer uses them.

    Raises:
        ValueError: there are no batches; NaN.
    """
    samples = [job.samples(layer) for layer in job.layers]

    def look(layer: Layer, x: Tensor) -> None:
        if x.numel():
            samples[layer.index].add(x)
            batch = Moments.unpack(select_kernel("auto", x).moments(x), layer.channels)
            observe(layer, batch)
            layer.use_moments(batch, unbiased=False)

    def work() -> list[int]:
        number = 0
        with intercepted(job.layers, look):
            for batch in job.batches:
                job.run(batch)
                number += 1
                job.report_progress(number, max(number, len(job.batches)))
        return [number]

    if not job.ranks.together(work, numbers=1).any():
        raise ValueError("got no batches on any rank; expected at least one")
    totals = {layer: job.total(layer, samples[layer.index]) for layer in job.layers}
    return {layer: total for layer, total in totals.items() if total.spread.samples > 0}


def unbiased(layer: Layer, moments: Moments) -> Tensor:
    """Return the unbiased variance of a batch, ``[C]``.

    Raises:
        ValueError: the batch has one value a channel.
    """
    if bool(moments.count < 2):
        raise ValueError(
            f"{layer.name}: got a batch with one value a channel, which has no variance to "
            "average; expected batches of two or more (method 'lockstep' takes any)"
        )
    return moments.variance(unbiased=True)


def stacked(mean: Tensor, var: Tensor) -> Tensor:
    """Return statistics as one tensor, ``[2, C]``."""
    return torch.stack([mean, var])
