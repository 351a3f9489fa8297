"""Statistics of all values, each batch normalized with its own: what "precise BN" wants to be.

A layer's own statistics are put together exactly from all batches of all ranks (law of total
variance). What it gets depends on the batch size, through the layers before it.
"""

from __future__ import annotations

from syncbn.calibration.job import Job
from syncbn.calibration.layers import Layer
from syncbn.calibration.onepass import one_pass
from syncbn.calibration.sums import Sums


def pooled(job: Job) -> dict[Layer, Sums]:
    """Return the sums over the inputs of every layer that was reached; the layers use them.

    Raises:
        ValueError: there are no batches; NaN.
    """
    totals = one_pass(job)
    for layer, sums in totals.items():
        layer.use_moments(sums.moments)
    return totals
