"""Exact in the memory of one batch: one pass over the data per layer, up to that layer.

Earlier layers already use their population statistics, so the result equals ``lockstep``'s.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from functools import partial
from itertools import islice

from torch import Tensor

from syncbn.calibration.batches import Batches, count_samples
from syncbn.calibration.context import (
    CalibrationContext,
    LayerInput,
    LayerInputs,
    hook_inputs,
    solve_fixed_point,
)
from syncbn.calibration.input_stats import InputStats
from syncbn.calibration.model_state import is_fully_sharded, preserve_rng_state
from syncbn.nn.bn_layers import BNLayer


def calibrate_sequential(
    context: CalibrationContext, whole_forwards: bool = False
) -> dict[BNLayer, InputStats]:
    """Return the input statistics of every layer that was reached; they are set in the layers.

    Args:
        context: inputs of the calibration.
        whole_forwards: True to run forwards to their end. A forward that ends early may leave
            state behind, such as an entry of a queue or an acquired lock.

    Raises:
        ValueError: one-shot batches, or batches that differ between passes; no batches;
            non-finite inputs; two layers without an order.
    """
    context.ranks.run_on_all_ranks(partial(_refuse_one_shot, context.batches))
    return solve_fixed_point(_Sequential(context, whole_forwards).run_pass)


def _refuse_one_shot(batches: Batches) -> None:
    if batches.is_one_shot:
        raise ValueError(
            f"method 'sequential' reads the batches once for every layer; got a one-shot "
            f"{type(batches.source).__name__}; expected a list, a DataLoader or another "
            "iterable that can be read again (method='lockstep' reads them once)"
        )


class _Sequential:
    def __init__(self, context: CalibrationContext, whole_forwards: bool) -> None:
        self._context = context
        self._whole_forwards = whole_forwards
        self._data_size: list[tuple[int, int]] = []  # batches and samples of the first pass

    def run_pass(self, frozen: frozenset[BNLayer]) -> LayerInputs:
        context = self._context
        order, calls = self._first_order()
        queue = [layer for layer in order if layer not in frozen]
        postponed: set[BNLayer] = set()
        inputs: LayerInputs = {}
        while queue:
            target = queue[0]
            read = _DataPass(context, {target}, {*inputs, *frozen}, queue, postponed)
            read.to_the_end = self._whole_forwards or len(queue) == 1 or calls[target.index] > 1
            earlier, later, times = read.run(self._data_size)
            if earlier is not None:
                if earlier in postponed:
                    raise ValueError(
                        f"{earlier.name} and {target.name}: their order differs between batches; "
                        "method 'sequential' needs an order of the layers"
                    )
                postponed.add(target)
                queue = [earlier, *(layer for layer in queue if layer is not earlier)]
                continue
            stats = context.reduce_stats(target, read.accumulators[target])
            inputs[target] = LayerInput(stats, times)
            target.set_moments(stats.moments)
            postponed.discard(target)
            queue.remove(target)
            if later is not None:
                queue.append(later)
            context.report_progress(len(inputs), len(inputs) + len(queue))
        if frozen:
            read = _DataPass(context, frozen, frozen.union(inputs))
            read.run(self._data_size)
            for layer in sorted(frozen, key=lambda layer: layer.index):
                stats = context.reduce_stats(layer, read.accumulators[layer])
                inputs[layer] = LayerInput(stats, calls[layer.index])
        return inputs

    def _first_order(self) -> tuple[list[BNLayer], list[int]]:
        """Return the layers in the order of the first batch, and the calls of each layer."""
        context = self._context
        indices: list[int] = []

        def record(layer: BNLayer, x: Tensor) -> None:
            indices.append(layer.index)

        def run() -> list[int] | None:
            has_batch = False
            with preserve_rng_state(context.batches.source), hook_inputs(context.layers, record):
                for batch in islice(context.batches, 1):
                    context.run(batch)
                    has_batch = True
            return indices if has_batch else None

        results = context.ranks.all_gather_result(run)
        first = next((result for result in results if result is not None), None)
        if first is None:
            raise ValueError("got no batches on any rank; expected at least one")
        calls = [first.count(layer.index) for layer in context.layers]
        return [context.layers[index] for index in dict.fromkeys(first)], calls


class _StopForward(BaseException):
    """End of a forward at a layer; not an Exception, which the forward may handle."""


class _DataPass:
    """Pass over the data that accumulates the inputs of target layers.

    Args:
        context: inputs of the calibration.
        targets: layers whose inputs are accumulated.
        known: layers that have their population statistics.
        queue: layers still to calibrate.
        postponed: layers of the queue that follow the target wherever both are called.
    """

    def __init__(
        self,
        context: CalibrationContext,
        targets: Collection[BNLayer],
        known: Collection[BNLayer],
        queue: Collection[BNLayer] = (),
        postponed: Collection[BNLayer] = (),
    ) -> None:
        self.accumulators = {
            layer: context.make_accumulator(layer, exact=False) for layer in targets
        }
        #: True to run whole forwards, which count calls and find layers after the target.
        self.to_the_end = not queue
        self._context = context
        self._known = known
        self._queue = queue
        self._postponed = postponed
        self._passed: BNLayer | None = None
        self._earlier: BNLayer | None = None
        self._later: BNLayer | None = None
        self._calls = self._max_calls = 0

    def run(self, data_size: list[tuple[int, int]]) -> tuple[BNLayer | None, BNLayer | None, int]:
        """Run the pass on all ranks.

        Args:
            data_size: batches and samples of the first pass; empty before.

        Returns:
            An unknown layer before the target; a layer after the target that is not in the queue;
            the calls of the target in a forward.

        Raises:
            ValueError: this rank's data differs from the first pass.
        """
        context = self._context

        def run() -> tuple[int, int, int]:
            # FSDP cannot resume after a forward that ends early.
            sharded = any(is_fully_sharded(module) for module in context.model.modules())
            self.to_the_end = self.to_the_end or sharded
            self._read_all(data_size)
            if any(accumulator.has_lost_digits() for accumulator in self.accumulators.values()):
                self.accumulators = {
                    layer: context.make_accumulator(layer) for layer in self.accumulators
                }
                self._read_all(data_size)
            earlier, later = (-1 if x is None else x.index for x in (self._earlier, self._later))
            return earlier, later, self._max_calls

        results = zip(*context.ranks.all_gather_result(run), strict=True)
        earlier, later, calls = (max(values) for values in results)
        found = (context.layers[index] if index >= 0 else None for index in (earlier, later))
        return (*found, calls)

    def _read_all(self, data_size: list[tuple[int, int]]) -> None:
        context = self._context
        batches = samples = 0
        with preserve_rng_state(context.batches.source), hook_inputs(context.layers, self._hook):
            for batch in context.batches:
                self._calls, self._passed = 0, None
                with suppress(_StopForward):
                    context.run(batch)
                if self._earlier is not None:
                    return
                batches += 1
                samples += count_samples(batch) or 0
        data_size[:] = data_size or [(batches, samples)]
        if data_size != [(batches, samples)]:
            raise ValueError(
                f"method 'sequential' got {data_size[0]} batches and samples in a pass, and "
                f"({batches}, {samples}) in a later one; expected the same data in every pass "
                "(method='lockstep' reads it once)"
            )

    def _hook(self, layer: BNLayer, x: Tensor) -> None:
        if layer in self.accumulators:
            if self._passed is not None:
                self._earlier = self._passed
                raise _StopForward
            self._calls += 1
            self._max_calls = max(self._calls, self._max_calls)
            self.accumulators[layer].add(x)
            if not self.to_the_end:
                raise _StopForward
        elif layer not in self._known:
            if layer in self._postponed and not self._calls:
                self._passed = layer  # valid if the target is not called later in this forward
            elif not self._calls and self._passed is None:
                self._earlier = layer
                raise _StopForward
            elif self._calls and layer not in self._queue:
                self._later = layer
