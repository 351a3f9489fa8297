"""Exact in one pass: all batches wait at a layer until its statistics are those of all of them.

Every layer's input is then the one that the network sees in inference, whatever the batches' size.
Interleaved passes disturb each other if the model keeps state between its layers. So the layer
inputs of two batches are compared with single passes. If they differ, ``sequential`` replaces
lockstep.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch

from syncbn.calibration.budget import Room
from syncbn.calibration.job import Job
from syncbn.calibration.layers import Layer, back_up, put_back
from syncbn.calibration.passes import Passes
from syncbn.calibration.sequential import sequential
from syncbn.calibration.settle import Found, add_call, settle
from syncbn.calibration.sums import Sums
from syncbn.calibration.verification import InterferenceError


def lockstep(job: Job) -> dict[Layer, Sums]:
    """Return the sums over the inputs of every layer that was reached; the layers use them.

    Raises:
        ValueError: no batches; batches that come to different layers; NaN; passes that disturb
            each other, if ``sequential`` fails, too.
        MemoryError: the suspended passes would not fit.

    Warns:
        UserWarning: ``sequential`` replaced lockstep; on the first rank.
    """
    # A second attempt, and layers that are called again, take more passes.
    job = replace(job, batches=job.batches.kept())
    room, backup, seed = Room(job), back_up(job.layers), torch.initial_seed()
    for join in (True, False):
        try:
            return settle(job, _Attempt(job, room, join, seed))
        except InterferenceError as error:
            reason, joined = str(error), error.joined
        put_back(backup)
        if not joined:
            break
    try:
        totals = sequential(job, whole_forwards=True)
    except ValueError as error:
        raise ValueError(
            f"lockstep is not possible ({reason}), and method 'sequential', which replaced it, "
            f"failed: {error}"
        ) from error
    sentence = f"lockstep is not possible ({reason}); sequential replaced it"
    job.report_check(sentence)

    def warn() -> None:
        if job.ranks.rank == 0:
            warnings.warn(sentence, stacklevel=2)

    job.ranks.agreed(warn)  # a filter may turn the warning into an error
    return totals


@dataclass
class _Attempt:
    """Lockstep with or without joined batches; a call is one pass over the data.

    Attributes:
        job: the calibration.
        room: memory for suspended passes.
        join: permission to compute small batches as one.
        seed: seed for forwards that draw random numbers.
        verified: True once layer inputs were compared with single passes.
    """

    job: Job
    room: Room
    join: bool
    seed: int
    verified: bool = False

    def __call__(self, held: frozenset[Layer]) -> Found:
        job = self.job
        found: Found = {}
        passes = Passes(job, self.room, self.join, self.seed)
        try:
            layer = passes.begin()
            while layer is not None:
                add_call(found, layer, job.total(layer, passes.take_samples(layer)))
                if layer not in held:
                    layer.use_moments(found[layer].sums.moments)
                job.report_progress(len(found), len(job.layers))
                layer = passes.go_on()
        finally:
            passes.close()
        # Single passes repeat the inputs only if no layer changed statistics between its calls.
        steady = all(layer in held for layer, input in found.items() if input.calls > 1)
        if steady and not self.verified:
            job.report_check(passes.verify(len(found)))
            self.verified = True
        return found
