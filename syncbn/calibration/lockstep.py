"""Exact in one pass: all batches are suspended at a layer until its statistics cover all of them.

Each layer's input is then the one that the network has in inference, at any batch size. Interleaved
passes interfere if the model keeps state between its layers. So the layer inputs of two batches are
compared with single passes. If they differ, ``sequential`` replaces lockstep.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch

from syncbn.calibration.context import CalibrationContext, LayerInputs, add_call, solve_fixed_point
from syncbn.calibration.input_stats import InputStats
from syncbn.calibration.memory import MemoryBudget
from syncbn.calibration.passes import InterleavedPasses
from syncbn.calibration.sequential import calibrate_sequential
from syncbn.calibration.verification import InterferenceError
from syncbn.nn.bn_layers import BNLayer, clone_running_stats, restore_running_stats


def calibrate_lockstep(context: CalibrationContext) -> dict[BNLayer, InputStats]:
    """Return the input statistics of every layer that was reached; they are set in the layers.

    Raises:
        ValueError: no batches; batches that reach different layers; non-finite inputs; passes that
            interfere, if ``sequential`` also fails.
        MemoryError: the suspended passes exceed the memory limit.

    Warns:
        UserWarning: ``sequential`` replaced lockstep; on rank 0.
    """
    # A second attempt, and layers that are called again, take more passes.
    context = replace(context, batches=context.batches.cached())
    budget, seed = MemoryBudget(context), torch.initial_seed()
    stats = clone_running_stats(context.layers)
    for coalesce in (True, False):
        try:
            return solve_fixed_point(_Attempt(context, budget, coalesce, seed).run_pass)
        except InterferenceError as error:
            reason, coalesced = str(error), error.coalesced
        restore_running_stats(stats)
        if not coalesced:
            break
    try:
        results = calibrate_sequential(context, whole_forwards=True)
    except ValueError as error:
        raise ValueError(
            f"lockstep is not possible ({reason}), and method 'sequential', which replaced it, "
            f"failed: {error}"
        ) from error
    sentence = f"lockstep is not possible ({reason}); sequential replaced it"
    context.report_check(sentence)

    def warn() -> None:
        if context.ranks.rank == 0:
            warnings.warn(sentence, stacklevel=2)

    context.ranks.run_on_all_ranks(warn)  # a filter may turn the warning into an error
    return results


@dataclass
class _Attempt:
    """Lockstep with or without coalesced batches.

    Attributes:
        context: inputs of the calibration.
        budget: memory for suspended passes.
        coalesce: permission to coalesce small batches.
        seed: seed for forwards that draw random numbers.
        verified: True after a comparison of layer inputs with single passes.
    """

    context: CalibrationContext
    budget: MemoryBudget
    coalesce: bool
    seed: int
    verified: bool = False

    def run_pass(self, frozen: frozenset[BNLayer]) -> LayerInputs:
        context = self.context
        inputs: LayerInputs = {}
        passes = InterleavedPasses(context, self.budget, self.coalesce, self.seed)
        try:
            layer = passes.start()
            while layer is not None:
                add_call(inputs, layer, context.reduce_stats(layer, passes.pop_inputs(layer)))
                if layer not in frozen:
                    layer.set_moments(inputs[layer].stats.moments)
                context.report_progress(len(inputs), len(context.layers))
                layer = passes.resume()
        finally:
            passes.close()
        # Single passes repeat the inputs only if no layer changed statistics between its calls.
        steady = all(layer in frozen for layer, entry in inputs.items() if entry.calls > 1)
        if steady and not self.verified:
            context.report_check(passes.verify(len(inputs)))
            self.verified = True
        return inputs
