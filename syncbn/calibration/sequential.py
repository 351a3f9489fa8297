"""Exact in the memory of one batch: one pass over the data per layer, up to that layer.

Earlier layers already use their population statistics, so the result equals ``lockstep``'s.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor

from syncbn.calibration.batches import count_samples
from syncbn.calibration.context import (
    CalibrationContext,
    InputStats,
    Results,
    StatsAccumulator,
    hook_inputs,
    solve_fixed_point,
)
from syncbn.calibration.model import is_fully_sharded, preserve_rng_state
from syncbn.nn.bn_layers import BNLayer


def calibrate_sequential(context: CalibrationContext, whole_forwards: bool = False) -> Results:
    """Return the input statistics of every layer that was reached; they are set in the layers.

    Args:
        context: inputs of the calibration.
        whole_forwards: True to run forwards to their end. A forward that ends early may leave
            state behind, such as an entry of a queue or an acquired lock.

    Raises:
        ValueError: one-shot batches, or batches that differ between passes; no batches;
            non-finite inputs; two layers without an order.
    """

    def refuse_one_shot() -> None:
        if context.batches.is_one_shot:
            raise ValueError(
                f"method 'sequential' reads the batches once for every layer; got a one-shot "
                f"{type(context.batches.source).__name__}; expected a list, a DataLoader or "
                "another iterable that can be read again (method='lockstep' reads them once)"
            )

    context.ranks.run_on_all_ranks(refuse_one_shot)
    return solve_fixed_point(_Sequential(context, whole_forwards).run_pass)


class _StopForward(BaseException):
    """End of a forward at a layer; not an Exception, which the forward may handle."""


class _Sequential:
    def __init__(self, context: CalibrationContext, whole_forwards: bool) -> None:
        self._context = context
        # FSDP cannot resume after a forward that ends early.
        sharded = any(is_fully_sharded(module) for module in context.model.modules())
        self._whole_forwards = whole_forwards or sharded
        self._data_size: tuple[int, int] | None = None  # batches and samples of the first pass

    def run_pass(self, frozen: frozenset[BNLayer]) -> tuple[Results, set[BNLayer]]:
        """Calibrate all layers except the frozen ones, in the order of the forward.

        Forwards end at their first unknown layer. If it is the same one in all batches, its inputs
        are complete. If not, whole forwards show the layers that follow another unknown layer.
        """
        context = self._context
        expected, called_again = self._first_order()
        results: Results = {}
        repeated: set[BNLayer] = set()
        while True:
            unknown = [layer for layer in expected if layer not in frozen and layer not in results]
            whole = self._whole_forwards or len(unknown) < 2 or unknown[0] in called_again
            # The frozen layers are read last, with the new statistics of the remaining layers.
            result = self._read(frozen.union(results), () if unknown else frozen, whole)
            if not whole and len(result.first) != 1:
                whole, result = True, self._read(frozen.union(results), (), True)
            ready = [context.layers[index] for index in sorted(result.first - result.later)]
            if result.first and not ready:
                one, other, *_ = (context.layers[index].name for index in sorted(result.first))
                raise ValueError(
                    f"{one} and {other}: their order differs between batches; method "
                    "'sequential' needs an order of the layers"
                )
            for layer in ready:
                results[layer] = self._reduce(layer, result)
                layer.set_moments(results[layer].moments)
            # Only whole forwards show all calls; the last pass runs whole forwards.
            repeated.update(layer for layer in results if layer.index in result.repeated)
            left = sum(layer not in results for layer in unknown)
            context.report_progress(len(results), len(results) + left)
            if whole and not result.later and not (frozen and ready):
                break
        if frozen and unknown:  # the last pass has read unknown layers instead
            result = self._read(frozen.union(results), frozen, True)
        for layer in sorted(frozen, key=lambda layer: layer.index):
            results[layer] = self._reduce(layer, result)
        return results, repeated

    def _reduce(self, layer: BNLayer, result: _PassResult) -> InputStats:
        context = self._context
        accumulator = result.accumulators.get(layer) or context.make_accumulator(layer)
        return context.reduce_stats(layer, accumulator)

    def _first_order(self) -> tuple[list[BNLayer], set[BNLayer]]:
        """Return the layers in the order of the first batch, and the layers that it calls again."""
        context = self._context
        indices: list[int] = []

        def run() -> list[int] | None:
            has_batch = False
            with (
                preserve_rng_state(context.batches.source),
                hook_inputs(context.layers, lambda layer, x: indices.append(layer.index)),
            ):
                for batch in islice(context.batches, 1):
                    context.run(batch)
                    has_batch = True
            return indices if has_batch else None

        results = context.ranks.all_gather_result(run)
        first = next((result for result in results if result is not None), None)
        if first is None:
            raise ValueError("got no batches on any rank; expected at least one")
        layers = [context.layers[index] for index in dict.fromkeys(first)]
        return layers, {layer for layer in layers if first.count(layer.index) > 1}

    def _read(
        self, known: Collection[BNLayer], targets: Collection[BNLayer], whole: bool
    ) -> _PassResult:
        """Accumulate the inputs of the first unknown layers, in a pass over the data of all ranks.

        Args:
            known: layers that have their population statistics, and frozen layers.
            targets: known layers whose inputs are accumulated, too.
            whole: True to run forwards to their end.
        """
        local: list[_PassResult] = []

        def run() -> tuple[set[int], set[int], set[int]]:
            result = self._read_all(known, targets, whole, exact=False)
            if any(accumulator.has_lost_digits() for accumulator in result.accumulators.values()):
                result = self._read_all(known, targets, whole, exact=True)
            local.append(result)
            return result.first, result.later, result.repeated

        parts = zip(*self._context.ranks.all_gather_result(run), strict=True)
        first, later, repeated = (set().union(*sets) for sets in parts)
        return _PassResult(first, later, repeated, local[0].accumulators)

    def _read_all(
        self, known: Collection[BNLayer], targets: Collection[BNLayer], whole: bool, exact: bool
    ) -> _PassResult:
        context, result = self._context, _PassResult()
        current: BNLayer | None = None  # the first unknown layer of the forward
        called: set[int] = set()

        def hook(layer: BNLayer, x: Tensor) -> None:
            nonlocal current
            if layer.index in called:
                result.repeated.add(layer.index)
            called.add(layer.index)
            if layer not in known:
                if current not in (None, layer):
                    result.later.add(layer.index)
                    return
                result.first.add(layer.index)
                current = layer
            elif layer not in targets:
                return
            if layer not in result.accumulators:
                result.accumulators[layer] = context.make_accumulator(layer, exact)
            result.accumulators[layer].add(x)
            if not whole:
                raise _StopForward

        batches = samples = 0
        with preserve_rng_state(context.batches.source), hook_inputs(context.layers, hook):
            for batch in context.batches:
                current = None
                called.clear()
                with suppress(_StopForward):
                    context.run(batch)
                batches += 1
                samples += count_samples(batch) or 0
        self._data_size = self._data_size or (batches, samples)
        if self._data_size != (batches, samples):
            raise ValueError(
                f"method 'sequential' got {self._data_size} batches and samples in a pass, and "
                f"({batches}, {samples}) in a later one; expected the same data in every pass "
                "(method='lockstep' reads it once)"
            )
        return result


@dataclass
class _PassResult:
    """Layers of a pass, by index, and their inputs.

    Attributes:
        first: first unknown layer of each forward.
        later: unknown layers that follow another unknown layer.
        repeated: layers that a forward calls again.
        accumulators: inputs of the first unknown layers and of the targets, on this rank.
    """

    first: set[int] = field(default_factory=set)
    later: set[int] = field(default_factory=set)
    repeated: set[int] = field(default_factory=set)
    accumulators: dict[BNLayer, StatsAccumulator] = field(default_factory=dict)
