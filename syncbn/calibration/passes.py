"""Interleaved forward passes of many batches, which stop together at every batch-norm layer.

The inputs of a layer, of the whole calibration set, are in memory together. So small batches may as
well be computed together, if that changes no input.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor

from syncbn.calibration.batches import default_forward, group_batches
from syncbn.calibration.budget import Room
from syncbn.calibration.intercept import intercepted
from syncbn.calibration.job import Job
from syncbn.calibration.layers import Layer
from syncbn.calibration.randomness import seed_generators
from syncbn.calibration.samples import Samples
from syncbn.calibration.suspended import Stop, Suspended, stop
from syncbn.calibration.verification import (
    InterferenceError,
    Trace,
    largest_difference,
    trace_parts,
)

# Passes that are compared with single passes. One is not enough: it may fill a cache that the
# second finds.
_CHECKED = 2


class Passes:
    """The forward passes of all batches of this rank; they stop at the same layer on all ranks.

    Args:
        job: the calibration.
        room: memory for the passes.
        join: permission to compute small batches as one.
        seed: seed for forwards that draw random numbers.
    """

    def __init__(self, job: Job, room: Room, join: bool, seed: int) -> None:
        self._job = job
        self._room = room
        self._join = join and job.forward is default_forward
        self._seed = seed
        self._draws, self._eps = False, 0.0
        self._passes: list[Suspended] = []
        self._traces: list[list[Trace]] = []
        self._joined = False
        self._reason = ""
        self._stops = 0
        self._indices: set[int] = set()
        self._samples: Samples | None = None
        self._inputs: list[Tensor] = []
        self._hooks = ExitStack()
        # Ranks exchange the index of a layer, or one of these.
        self._finished, self._no_data = len(job.layers), len(job.layers) + 1
        self._interference = len(job.layers) + 2

    def begin(self) -> Layer | None:
        """Run all passes to the first layer and return it; None at their end."""
        return self._sync_step(self._start_all)

    def go_on(self) -> Layer | None:
        """Run all passes to the next layer and return it; None at their end."""
        return self._sync_step(self._resume_all)

    def take_samples(self, layer: Layer) -> Samples:
        """Return this rank's inputs of the layer that the passes have stopped at."""
        samples, inputs = self._samples or self._job.samples(layer), self._inputs
        self._samples, self._inputs = None, []
        if samples.must_be_precise():
            samples = self._job.samples(layer)
            for x in inputs:
                samples.add(x)
        return samples

    def close(self) -> None:
        """End the passes where they are."""
        self._inputs.clear()
        for forward in self._passes:
            forward.close()
        self._hooks.close()

    def verify(self, layers: int) -> str:
        """Compare the inputs of layers with single passes over two batches, after :meth:`close`.

        Args:
            layers: number of layers that the passes have reached.

        Returns:
            A sentence on the comparison, the same on every rank.

        Raises:
            InterferenceError: the inputs differ on some rank; raised on every rank.
        """
        job = self._job

        def compare() -> tuple[int, float]:
            try:
                return self._run_single_passes()
            except InterferenceError as error:
                self._reason = str(error)
                return 0, 0.0

        own = job.ranks.agreed(compare, "the comparison with single passes")
        everyone = job.ranks.objects((self._reason, *own))
        if any(reason for reason, _, _ in everyone):
            raise self._gather_interference()
        batches = sum(batches for _, batches, _ in everyone)
        if not batches:
            return "a single batch on each rank; nothing was interleaved"
        largest = max(largest for _, _, largest in everyone)
        return (
            f"inputs of {layers} layers for {batches} batches match single passes "
            f"(largest difference {largest:.1g} standard deviations)"
        )

    def _start_all(self) -> None:
        job = self._job
        rest = iter(job.batches)
        first = list(islice(rest, 1))
        if not first:
            return
        observed = self._room.start(*first)
        if self._room.lock is not None:
            raise InterferenceError(self._room.lock)
        self._draws, self._eps = observed.draws, observed.eps
        self._hooks.enter_context(intercepted(job.layers, stop))
        batches = chain(first, rest)
        join = self._join and not (observed.reads_data or observed.draws)
        for group in group_batches(batches) if join else ([batch] for batch in batches):
            batch = torch.cat(group) if len(group) > 1 else group[0]
            self._room.take(batch)
            self._joined = self._joined or len(group) > 1
            number = len(self._passes)
            if number < _CHECKED:
                self._traces.append(trace_parts(group))
            self._passes.append(Suspended(partial(job.run, batch)))
            self._on_suspend(number, self._resume(number))

    def _resume_all(self) -> None:
        self._indices.clear()
        self._stops += 1
        for number in range(len(self._passes)):
            self._on_suspend(number, self._resume(number))

    def _resume(self, number: int) -> Stop | None:
        self._seed_draws(number, self._stops)
        forward = self._passes[number]
        try:
            return forward.resume()
        except Exception as error:
            # Joined batches, or the state of a suspended pass, may be the cause. If they are not,
            # the attempt without them raises the error again.
            others = (other for other in self._passes if other is not forward)
            if self._joined or any(other.is_suspended for other in others):
                raise InterferenceError(
                    f"a pass fails beside others: {type(error).__name__}: {error}"
                ) from error
            raise

    def _on_suspend(self, number: int, stop: Stop | None) -> None:
        if stop is None:
            self._indices.add(self._finished)
            return
        self._indices.add(stop.layer.index)
        for trace in self._traces[number] if number < _CHECKED else ():
            trace.add(*stop)
        if len(self._indices) == 1:
            if self._samples is None:
                self._samples = self._job.samples(stop.layer, precise=False)
            self._samples.add(stop.input)  # now, while it is in the cache
            self._inputs.append(stop.input)

    def _run_single_passes(self) -> tuple[int, float]:
        """Return the number of batches compared, and the largest difference."""
        if len(self._passes) < 2 and not self._joined:
            return 0, 0.0
        # A causal forward cannot show joined batches in the first, nor a reversed one in the last.
        checked = ((0, self._traces[0][0]), (len(self._traces) - 1, self._traces[-1][-1]))
        return len(checked), max(self._compare(number, trace) for number, trace in checked)

    def _compare(self, number: int, trace: Trace) -> float:
        single = Trace(trace.batch)

        def record(layer: Layer, x: Tensor) -> None:
            single.add(layer, x)
            self._seed_draws(number, len(single.entries))

        self._seed_draws(number, 0)
        with intercepted(self._job.layers, record):
            self._job.run(trace.batch)
        return largest_difference(trace, single, self._eps)

    def _seed_draws(self, number: int, stops: int) -> None:
        """Make random numbers a function of the pass and the layer: single passes repeat them."""
        if self._draws:
            seed_generators(self._seed, number, stops)

    def _sync_step(self, step: Callable[[], None]) -> Layer | None:
        def work() -> list[int]:
            try:
                step()
                return [self._layer_index()]
            except InterferenceError as error:
                self._reason = str(error)
                return [self._interference]

        indices = set(self._job.ranks.together(work, numbers=1).flatten().tolist())
        if self._interference in indices:
            self._job.ranks.agreed(self._finish, "the end of suspended passes")
            raise self._gather_interference()
        indices.discard(self._no_data)
        if not indices:
            raise ValueError("got no batches on any rank; expected at least one")
        if len(indices) > 1:
            self._reason = self._describe_layers("ranks", indices)
            error = self._gather_interference()
            raise error if error.joined else ValueError(self._reason)
        index = indices.pop()
        return None if index == self._finished else self._job.layers[index]

    def _finish(self) -> None:
        """Run suspended passes to their end: a model may reset its state only there."""
        for forward in self._passes:
            with suppress(Exception):
                while forward.resume() is not None:
                    pass

    def _gather_interference(self) -> InterferenceError:
        """Return the same error on every rank; every rank must call this."""
        everyone = self._job.ranks.objects((self._reason, self._joined))
        error = InterferenceError(next(reason for reason, _ in everyone if reason))
        error.joined = any(joined for _, joined in everyone)
        return error

    def _layer_index(self) -> int:
        if len(self._indices) > 1:
            text = self._describe_layers("batches", self._indices)
            raise InterferenceError(text) if self._joined else ValueError(text)
        return min(self._indices, default=self._no_data)

    def _describe_layers(self, members: str, indices: set[int]) -> str:
        first, *others = (
            "the end" if index == self._finished else repr(self._job.layers[index].name)
            for index in sorted(indices)
        )
        return (
            f"the {members} come to different layers: some to {first} while others come to "
            f"{' or '.join(others)}; method 'lockstep' needs a forward that calls the same layers "
            "in the same order for every batch; method 'sequential' does not"
        )
