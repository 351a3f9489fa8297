"""Exact in one pass: all batches are suspended at a layer until its statistics cover all of them.

Each layer's input is then the one that the network has in inference, at any batch size. All inputs
of a layer are in memory together, so small batches are coalesced if that changes no input.
Interleaved passes interfere if the model keeps state between its layers. So the layer inputs of two
batches are compared with single passes. If they differ, ``sequential`` replaces lockstep.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from syncbn.calibration.batches import coalesce_batches, count_samples, default_forward
from syncbn.calibration.checks import (
    TRACED_PASSES,
    ForwardProfile,
    InterferenceError,
    Trace,
    compare_with_single_passes,
    limit_memory,
    make_traces,
    profile_batch,
)
from syncbn.calibration.context import (
    CalibrationContext,
    Results,
    StatsAccumulator,
    hook_inputs,
    solve_fixed_point,
)
from syncbn.calibration.model import seed_generators
from syncbn.calibration.sequential import calibrate_sequential
from syncbn.calibration.suspension import ForwardCoroutine, suspend
from syncbn.nn.bn_layers import BNLayer, clone_running_stats, restore_running_stats


def calibrate_lockstep(context: CalibrationContext) -> Results:
    """Return the input statistics of every layer that was reached; they are set in the layers.

    Raises:
        ValueError: no batches; batches that reach different layers; non-finite inputs; passes that
            interfere, if ``sequential`` also fails.
        MemoryError: the suspended passes exceed the memory limit.

    Warns:
        UserWarning: ``sequential`` replaced lockstep; on rank 0.
    """
    # A second attempt, and layers that are called again, take more passes.
    batches = context.batches.cached()
    context = replace(context, batches=batches, max_bytes=limit_memory(context))
    stats = clone_running_stats(context.layers)
    lockstep = _Lockstep(context)
    for coalesce in (True, False):
        try:
            return lockstep.run(coalesce)
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


class _Lockstep:
    """Forward passes of all batches of this rank, suspended at the same layer on all ranks."""

    def __init__(self, context: CalibrationContext) -> None:
        self._context = context
        self._seed = torch.initial_seed()
        self._end = len(context.layers)  # the index at the end of a pass
        self._profile: ForwardProfile | None = None

    def run(self, coalesce: bool) -> Results:
        """Calibrate all layers.

        Args:
            coalesce: permission to coalesce small batches.

        Raises:
            InterferenceError: the passes interfere; raised on every rank.
        """
        self._coalesce, self._verified = coalesce, False
        return solve_fixed_point(self._run_pass)

    def _run_pass(self, frozen: frozenset[BNLayer]) -> tuple[Results, set[BNLayer]]:
        context = self._context
        results: Results = {}
        repeated: set[BNLayer] = set()
        self._passes: list[ForwardCoroutine] = []
        self._traces: list[list[Trace]] = []
        self._coalesced, self._step = False, 0
        self._indices: set[int] = set()
        self._accumulator: StatsAccumulator | None = None
        self._inputs: list[Tensor] = []
        with ExitStack() as stack:
            stack.callback(lambda: self._inputs.clear())
            layer = self._sync_step(lambda: self._start_all(stack))
            while layer is not None:
                stats = context.reduce_stats(layer, self._pop_inputs(layer))
                if layer in results:
                    repeated.add(layer)
                    stats = results[layer] + stats
                results[layer] = stats
                if layer not in frozen:
                    layer.set_moments(stats.moments)
                context.report_progress(len(results), len(context.layers))
                layer = self._sync_step(self._resume_all)
        # Single passes repeat the inputs only if no layer changed statistics between its calls.
        if repeated <= frozen and not self._verified:
            context.report_check(self._verify(len(results)))
            self._verified = True
        return results, repeated

    def _start_all(self, stack: ExitStack) -> None:
        """Run all passes to the first layer; the stack ends them and the hooks of the layers."""
        context = self._context
        rest = iter(context.batches)
        first = list(islice(rest, 1))
        if not first:
            return
        profile = self._profile = self._profile or profile_batch(context, *first)
        if profile.lock is not None:
            raise InterferenceError(profile.lock)
        stack.enter_context(hook_inputs(context.layers, suspend))
        batches = chain(first, rest)
        coalesce = self._coalesce and context.forward is default_forward
        # A forward that reads values may depend on the batch as a whole.
        coalesce = coalesce and not (profile.reads_data or profile.draws)
        expected, samples = context.batches.expected_samples(), 0
        for group in coalesce_batches(batches) if coalesce else ([batch] for batch in batches):
            batch = torch.cat(group) if len(group) > 1 else group[0]
            samples += count_samples(batch) or 1
            profile.require_memory(max(samples, expected), context.max_bytes)
            self._coalesced = self._coalesced or len(group) > 1
            if len(self._passes) < TRACED_PASSES:
                self._traces.append(make_traces(group))
            self._passes.append(ForwardCoroutine(partial(context.run, batch)))
            stack.callback(self._passes[-1].close)
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

    def _pop_inputs(self, layer: BNLayer) -> StatsAccumulator:
        """Return the accumulated inputs of the current layer on this rank, and release them."""
        accumulator = self._accumulator or self._context.make_accumulator(layer)
        inputs = self._inputs
        self._accumulator, self._inputs = None, []
        if accumulator.has_lost_digits():
            accumulator = self._context.make_accumulator(layer)
            for x in inputs:
                accumulator.add(x)
        return accumulator

    def _seed_draws(self, number: int, step: int) -> None:
        """Make random numbers a function of pass and layer, so that single passes repeat them."""
        if self._profile is not None and self._profile.draws:
            seed_generators(self._seed, number, step)

    def _sync_step(self, step: Callable[[], None]) -> BNLayer | None:
        """Run a step on all ranks; return the layer that all passes have reached, None at the end.

        Raises:
            ValueError: no batches; batches or ranks reach different layers.
        """

        def run() -> set[int]:
            step()
            return self._indices

        results, coalesced = self._run_on_all_ranks(run, "a pass over the data")
        indices = set().union(*results)
        if not indices:
            raise ValueError("got no batches on any rank; expected at least one")
        if len(indices) == 1:
            index = indices.pop()
            return None if index == self._end else self._context.layers[index]
        members = "batches" if any(len(found) > 1 for found in results) else "ranks"
        first, *rest = (
            "the end" if index == self._end else repr(self._context.layers[index].name)
            for index in sorted(indices)
        )
        text = (
            f"the {members} reach different layers: some {first}, and some {' or '.join(rest)}; "
            "method 'lockstep' needs a forward that calls the same layers in the same order for "
            "every batch; method 'sequential' does not"
        )
        raise self._make_interference(text, True) if coalesced else ValueError(text)

    def _run_on_all_ranks(self, work: Callable[[], Any], step: str) -> tuple[list[Any], bool]:
        """Return the results of all ranks; the flag is True if a rank has coalesced batches.

        Raises:
            InterferenceError: the function raised it on a rank; raised on every rank.
        """

        def run() -> tuple[str, bool, list[Any]]:
            try:
                return "", self._coalesced, [work()]
            except InterferenceError as error:
                return str(error), self._coalesced, []

        ranks = self._context.ranks
        reasons, flags, results = zip(*ranks.all_gather_result(run, step), strict=True)
        for reason in filter(None, reasons):
            raise self._make_interference(reason, any(flags))
        return [*chain(*results)], any(flags)

    def _make_interference(self, reason: str, coalesced: bool) -> InterferenceError:
        def finish() -> None:
            # A model may reset its state only at the end of a forward.
            for forward in self._passes:
                with suppress(Exception):
                    while forward.resume() is not None:
                        pass

        self._context.ranks.run_on_all_ranks(finish, "the end of suspended passes")
        return InterferenceError(reason, coalesced)

    def _verify(self, num_layers: int) -> str:
        """Return a sentence on the comparison of the closed passes with single passes.

        Args:
            num_layers: number of layers that the passes have reached.

        Raises:
            InterferenceError: the inputs differ on a rank; raised on every rank.
        """

        def compare() -> tuple[int, float]:
            if len(self._passes) < 2 and not self._coalesced:
                return 0, 0.0
            assert self._profile is not None
            traces, eps = self._traces, self._profile.eps
            return 2, compare_with_single_passes(self._context, traces, eps, self._seed_draws)

        results, _ = self._run_on_all_ranks(compare, "the comparison with single passes")
        batches = sum(number for number, _ in results)
        if not batches:
            return "a single batch on each rank; nothing was interleaved"
        return (
            f"inputs of {num_layers} layers for {batches} batches match single passes (largest "
            f"difference {max(largest for _, largest in results):.1g} standard deviations)"
        )
