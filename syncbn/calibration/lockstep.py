"""Exact in one pass: all batches wait at a layer until its statistics are those of all of them.

Every layer's input is then the one that the network sees in inference, whatever the batches' size.
Interleaved passes disturb each other if the model keeps state between its layers. So the layer
inputs of two batches are compared with single passes. If they differ, ``sequential`` replaces
lockstep.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

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
    """
    # Layers that are called again take more passes.
    job = replace(job, batches=job.batches.kept())
    backup, seed = back_up(job.layers), torch.initial_seed()
    for join in (True, False):
        try:
            return settle(job, partial(_one_pass, job, join, seed))
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
    job.report_check(f"lockstep is not possible ({reason}); sequential replaced it")
    return totals


def _one_pass(job: Job, join: bool, seed: int, held: frozenset[Layer]) -> Found:
    passes = Passes(job, join, seed)
    found: Found = {}
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
    # A single pass repeats the inputs only if no layer changed its statistics between its calls.
    if all(layer in held for layer, input in found.items() if input.calls > 1):
        job.report_check(passes.verify(len(found)))
    return found
