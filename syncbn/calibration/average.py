"""Averages over batches of the mean and the unbiased variance, each batch with its own.

The formula of Ioffe and Szegedy (2015), algorithm 2: mean = E[mean_B], var = m/(m-1) E[var_B]. What
the means of batches differ by is not in the variance.
"""

from __future__ import annotations

from syncbn.calibration.job import Job
from syncbn.calibration.layers import Layer
from syncbn.calibration.onepass import one_pass, stacked, unbiased
from syncbn.calibration.sums import Sums
from syncbn.moments import Moments


def average(job: Job) -> dict[Layer, Sums]:
    """Return the sums over the inputs of every layer that was reached; the layers use averages.

    Raises:
        ValueError: there are no batches; a batch has one value a channel; NaN.
    """
    totals = [job.pivots[layer.index].new_zeros(2 * layer.channels + 1) for layer in job.layers]

    def observe(layer: Layer, moments: Moments) -> None:
        batch = stacked(moments.mean(), unbiased(layer, moments)).flatten()
        totals[layer.index][:-1] += batch
        totals[layer.index][-1] += 1

    found = one_pass(job, observe)
    for layer in found:
        total = job.ranks.sum(totals[layer.index], f"calibration of {layer.name}")
        layer.use(*(total[:-1] / total[-1]).chunk(2))
    return found
