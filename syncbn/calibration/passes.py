"""Interleaved forward passes of many batches, suspended together at every batch-norm layer.

All inputs of a layer are in memory together, so small batches may be coalesced if that changes no
input.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor

from syncbn.calibration.batches import coalesce_batches, default_forward
from syncbn.calibration.context import CalibrationContext, hook_inputs
from syncbn.calibration.coroutine import ForwardCoroutine, Suspension, suspend
from syncbn.calibration.input_stats import StatsAccumulator
from syncbn.calibration.memory import MemoryBudget
from syncbn.calibration.model_state import seed_generators
from syncbn.calibration.verification import (
    TRACED_PASSES,
    InterferenceError,
    Trace,
    compare_with_single_passes,
    make_traces,
)
from syncbn.nn.bn_layers import BNLayer


class InterleavedPasses:
    """Forward passes of all batches of this rank, suspended at the same layer on all ranks.

    Args:
        context: inputs of the calibration.
        budget: memory for the passes.
        coalesce: permission to coalesce small batches.
        seed: seed for forwards that draw random numbers.
    """

    def __init__(
        self, context: CalibrationContext, budget: MemoryBudget, coalesce: bool, seed: int
    ) -> None:
        self._context = context
        self._budget = budget
        self._coalesce = coalesce and context.forward is default_forward
        self._seed = seed
        self._draws, self._eps = False, 0.0
        self._passes: list[ForwardCoroutine] = []
        self._traces: list[list[Trace]] = []
        self._coalesced = False
        self._step = 0
        self._indices: set[int] = set()
        self._end = len(context.layers)  # the index at the end of a pass
        self._accumulator: StatsAccumulator | None = None
        self._inputs: list[Tensor] = []
        self._hooks = ExitStack()

    def start(self) -> BNLayer | None:
        """Run all passes to the first layer and return it; None at the end of the passes."""
        return self._sync_step(self._start_all)

    def resume(self) -> BNLayer | None:
        """Run all passes to the next layer and return it; None at the end of the passes."""
        return self._sync_step(self._resume_all)

    def pop_inputs(self, layer: BNLayer) -> StatsAccumulator:
        """Return the accumulated inputs of the current layer on this rank, and release them."""
        accumulator = self._accumulator or self._context.make_accumulator(layer)
        inputs = self._inputs
        self._accumulator, self._inputs = None, []
        if accumulator.has_lost_digits():
            accumulator = self._context.make_accumulator(layer)
            for x in inputs:
                accumulator.add(x)
        return accumulator

    def close(self) -> None:
        """End the passes early."""
        self._inputs.clear()
        for forward in self._passes:
            forward.close()
        self._hooks.close()

    def verify(self, num_layers: int) -> str:
        """Return a sentence on the comparison with single passes; call it after :meth:`close`.

        Args:
            num_layers: number of layers that the passes have reached.

        Raises:
            InterferenceError: the inputs differ on a rank; raised on every rank.
        """

        def compare() -> tuple[str, int, float]:
            if len(self._passes) < 2 and not self._coalesced:
                return "", 0, 0.0
            try:
                largest = compare_with_single_passes(
                    self._context, self._traces, self._eps, self._seed_draws
                )
            except InterferenceError as error:
                return str(error), 0, 0.0
            return "", 2, largest

        step = "the comparison with single passes"
        results = self._context.ranks.all_gather_result(lambda: (*compare(), self._coalesced), step)
        self._raise_interference([(reason, coalesced) for reason, _, _, coalesced in results])
        batches = sum(batches for _, batches, _, _ in results)
        if not batches:
            return "a single batch on each rank; nothing was interleaved"
        return (
            f"inputs of {num_layers} layers for {batches} batches match single passes (largest "
            f"difference {max(largest for _, _, largest, _ in results):.1g} standard deviations)"
        )

    def _start_all(self) -> None:
        context = self._context
        rest = iter(context.batches)
        first = list(islice(rest, 1))
        if not first:
            return
        profile = self._budget.reset(*first)
        if profile.lock is not None:
            raise InterferenceError(profile.lock)
        self._draws, self._eps = profile.draws, profile.eps
        self._hooks.enter_context(hook_inputs(context.layers, suspend))
        batches = chain(first, rest)
        # A forward that reads values may depend on the batch as a whole.
        coalesce = self._coalesce and not (profile.reads_data or profile.draws)
        for group in coalesce_batches(batches) if coalesce else ([batch] for batch in batches):
            batch = torch.cat(group) if len(group) > 1 else group[0]
            self._budget.reserve(batch)
            self._coalesced = self._coalesced or len(group) > 1
            if len(self._passes) < TRACED_PASSES:
                self._traces.append(make_traces(group))
            self._passes.append(ForwardCoroutine(partial(context.run, batch)))
            self._run_to_layer(len(self._passes) - 1)

    def _resume_all(self) -> None:
        self._indices.clear()
        self._step += 1
        for number in range(len(self._passes)):
            self._run_to_layer(number)

    def _run_to_layer(self, number: int) -> None:
        self._seed_draws(number, self._step)
        forward = self._passes[number]
        try:
            suspension = forward.resume()
        except Exception as error:
            # Coalesced batches, or the state of a suspended pass, may be the cause. If they are
            # not, the attempt without them raises the error again.
            suspended = any(p.is_suspended for p in self._passes if p is not forward)
            if self._coalesced or suspended:
                raise InterferenceError(
                    f"an interleaved pass fails: {type(error).__name__}: {error}"
                ) from error
            raise
        self._on_suspend(number, suspension)

    def _on_suspend(self, number: int, suspension: Suspension | None) -> None:
        if suspension is None:
            self._indices.add(self._end)
            return
        layer, x = suspension
        self._indices.add(layer.index)
        for trace in self._traces[number] if number < TRACED_PASSES else ():
            trace.add(layer, x)
        if len(self._indices) == 1:
            if self._accumulator is None:
                self._accumulator = self._context.make_accumulator(layer, exact=False)
            self._accumulator.add(x)  # now, while it is in the cache
            self._inputs.append(x)

    def _seed_draws(self, number: int, step: int) -> None:
        """Make random numbers a function of pass and layer, so that single passes repeat them."""
        if self._draws:
            seed_generators(self._seed, number, step)

    def _sync_step(self, step: Callable[[], None]) -> BNLayer | None:
        """Run a step on all ranks and return the layer that all passes have reached."""

        def run() -> tuple[str, bool, int | None]:
            try:
                step()
                index = self._layer_index()
            except InterferenceError as error:
                return str(error), self._coalesced, None
            return "", self._coalesced, index

        ranks = self._context.ranks
        results = ranks.all_gather_result(run)
        if any(reason for reason, _, _ in results):
            # A model may reset its state only at the end of a forward.
            ranks.run_on_all_ranks(self._finish, "the end of suspended passes")
        self._raise_interference([(reason, coalesced) for reason, coalesced, _ in results])
        indices = {index for _, _, index in results if index is not None}
        if not indices:
            raise ValueError("got no batches on any rank; expected at least one")
        if len(indices) > 1:
            text = self._describe_layers("ranks", indices)
            if any(coalesced for _, coalesced, _ in results):
                raise InterferenceError(text, coalesced=True)
            raise ValueError(text)
        index = indices.pop()
        return None if index == self._end else self._context.layers[index]

    def _finish(self) -> None:
        for forward in self._passes:
            with suppress(Exception):
                while forward.resume() is not None:
                    pass

    @staticmethod
    def _raise_interference(results: list[tuple[str, bool]]) -> None:
        """Raise the first reason of all ranks, if any, on every rank."""
        if reasons := [reason for reason, _ in results if reason]:
            raise InterferenceError(reasons[0], any(coalesced for _, coalesced in results))

    def _layer_index(self) -> int | None:
        if len(self._indices) > 1:
            text = self._describe_layers("batches", self._indices)
            raise InterferenceError(text) if self._coalesced else ValueError(text)
        return min(self._indices, default=None)

    def _describe_layers(self, members: str, indices: set[int]) -> str:
        first, *rest = (
            "the end" if index == self._end else repr(self._context.layers[index].name)
            for index in sorted(indices)
        )
        return (
            f"the {members} reach different layers: some {first}, and some {' or '.join(rest)}; "
            "method 'lockstep' needs a forward that calls the same layers in the same order for "
            "every batch; method 'sequential' does not"
        )
