"""Interleaved forward passes of many batches, which stop together at every batch-norm layer.

The inputs of a layer, of the whole calibration set, are in memory together. So small batches may as
well be computed together, if that changes no input.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from syncbn.calibration.batches import copy, count_samples, default_forward, group_batches
from syncbn.calibration.budget import Room
from syncbn.calibration.intercept import intercepted
from syncbn.calibration.job import Job
from syncbn.calibration.layers import Layer
from syncbn.calibration.randomness import seed_generators
from syncbn.calibration.samples import Samples
from syncbn.calibration.suspended import Stop, Suspended, stop
from syncbn.calibration.verification import InterferenceError, Trace, largest_difference

# Passes whose first batch runs again in a single pass. One is not enough: it may fill a cache that
# the second finds.
_CHECKED = 2
# Ranks exchange differences as integers.
_UNIT = 2.0**-60


class Passes:
    """The forward passes of all batches of this rank; they stop at the same layer on all ranks.

    Args:
        job: the calibration.
        join: permission to compute small batches as one.
        seed: seed for forwards that draw random numbers.
    """

    def __init__(self, job: Job, join: bool, seed: int) -> None:
        self._job = job
        self._join = join and job.forward is default_forward
        self._seed = seed
        self._draws, self._eps = False, 0.0
        self._runs: list[Callable[[], object]] = []
        self._passes: list[Suspended] = []
        self._traces: list[Trace] = []
        self._joining: bool | None = None
        self._stops = 0
        self._places: set[int] = set()
        self._samples: Samples | None = None
        self._inputs: list[Tensor] = []
        self._hooks = ExitStack()
        # Ranks exchange the index of a layer, or one of these.
        self._finished, self._no_data = len(job.layers), len(job.layers) + 1
        self._interference = len(job.layers) + 2

    def begin(self) -> Layer | None:
        """Run all passes to the first layer and return it; None at their end."""
        return self._agree(self._start_all)

    def go_on(self) -> Layer | None:
        """Run all passes to the next layer and return it; None at their end."""
        return self._agree(self._resume_all)

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
        rows = self._together(self._run_alone, numbers=3)
        batches = int(rows[:, 1].sum())
        if not batches:
            return "a single batch on each rank; nothing was interleaved"
        return (
            f"inputs of {layers} layers for {batches} batches match single passes "
            f"(largest difference {int(rows[:, 2].max()) * _UNIT:.1g} standard deviations)"
        )

    def _start_all(self) -> None:
        job = self._job
        rest = iter(job.batches)
        first = list(islice(rest, 1))
        if not first:
            return
        room = Room(job, *first)
        if room.lock is not None:
            raise InterferenceError(room.lock)
        self._draws, self._eps = room.observed.draws, room.observed.eps
        self._hooks.enter_context(intercepted(job.layers, stop))
        batches = chain(first, rest)
        together = self._join and not (room.observed.reads_data or self._draws)
        for group in group_batches(batches) if together else ([batch] for batch in batches):
            batch = torch.cat(group) if len(group) > 1 else group[0]
            room.take(batch)
            if len(group) == 1 or self._may_join(*group[:2]):
                self._start(batch, group[0])
            else:
                for part in group:
                    self._start(part, part)

    def _start(self, batch: Any, first: Any) -> None:
        number = len(self._runs)
        if number < _CHECKED:
            trace = Trace(copy(first), 0, count_samples(first), count_samples(batch))
            self._traces.append(trace)
        self._runs.append(partial(self._job.run, batch))
        self._passes.append(Suspended(self._runs[-1]))
        self._look(number, self._resume(number))

    def _resume_all(self) -> None:
        self._places.clear()
        self._stops += 1
        for number in range(len(self._passes)):
            self._look(number, self._resume(number))

    def _resume(self, number: int) -> Stop | None:
        self._seed_draws(number, self._stops)
        try:
            return self._passes[number].resume()
        except Exception as error:
            others = [run for n, run in enumerate(self._runs) if n != number]
            run = self._runs[number]
            if others and _succeed(run) and not _succeed(run, others[-1]):
                raise InterferenceError(f"a pass fails only beside others: {error}") from error
            raise

    def _look(self, number: int, stop: Stop | None) -> None:
        if stop is None:
            self._places.add(self._finished)
            return
        self._places.add(stop.layer.index)
        if number < len(self._traces):
            self._traces[number].add(*stop)
        if len(self._places) == 1:
            if self._samples is None:
                self._samples = self._job.samples(stop.layer, precise=False)
            self._samples.add(stop.input)  # now, while it is in the cache
            self._inputs.append(stop.input)

    def _may_join(self, one: Tensor, two: Tensor) -> bool:
        """Return whether two batches computed as one have the inputs of two single passes."""
        if self._joining is None:
            self._joining = self._compare_joined(one, two)
        return self._joining

    def _compare_joined(self, one: Tensor, two: Tensor) -> bool:
        samples = len(one) + len(two)
        parts = [Trace(one, 0, len(one), samples), Trace(two, len(one), samples, samples)]
        try:
            self._run_suspended(torch.cat([one, two]), parts)
            for part in parts:
                alone = Trace(part.batch)
                self._run_suspended(copy(part.batch), [alone])
                largest_difference(part, alone, self._eps)
        except Exception:  # of any kind, if the model takes one batch size only
            return False
        return True

    def _run_suspended(self, batch: Tensor, traces: list[Trace]) -> None:
        forward = Suspended(partial(self._job.run, batch))
        while (stop := forward.resume()) is not None:
            for trace in traces:
                trace.add(*stop)

    def _run_alone(self) -> list[int]:
        """Return zero, the number of batches compared, and the largest difference."""
        if len(self._passes) < 2 and not self._joining:
            return [0, 0, 0]
        largest = 0.0
        for number, trace in enumerate(self._traces):
            alone = Trace(trace.batch)

            def look(layer: Layer, x: Tensor, number: int = number, alone: Trace = alone) -> None:
                alone.add(layer, x)
                self._seed_draws(number, len(alone.entries))

            self._seed_draws(number, 0)
            with intercepted(self._job.layers, look):
                self._job.run(copy(trace.batch))
            largest = max(largest, largest_difference(trace, alone, self._eps))
        return [0, len(self._traces), round(largest / _UNIT)]

    def _seed_draws(self, number: int, stops: int) -> None:
        """Make random numbers a function of the pass and the layer: single passes repeat them."""
        if self._draws:
            seed_generators(self._seed, number, stops)

    def _agree(self, run: Callable[[], None]) -> Layer | None:
        def work() -> list[int]:
            run()
            return [self._place()]

        places = set(self._together(work, numbers=1).flatten().tolist())
        places.discard(self._no_data)
        if not places:
            raise ValueError("got no batches on any rank; expected at least one")
        if len(places) > 1:
            raise ValueError(_different("ranks", [self._name(place) for place in sorted(places)]))
        place = places.pop()
        return None if place == self._finished else self._job.layers[place]

    def _together(self, work: Callable[[], list[int]], numbers: int) -> Tensor:
        """Call :meth:`Ranks.together`; an InterferenceError on one rank is raised on all."""
        reason = ""

        def guarded() -> list[int]:
            nonlocal reason
            try:
                return work()
            except InterferenceError as error:
                reason = str(error)
                return [self._interference] * numbers

        rows = self._job.ranks.together(guarded, numbers)
        if bool((rows[:, 0] == self._interference).any()):
            everyone = self._job.ranks.objects((reason, bool(self._joining)))
            error = InterferenceError(next(reason for reason, _ in everyone if reason))
            error.joined = any(joined for _, joined in everyone)
            raise error
        return rows

    def _place(self) -> int:
        if len(self._places) > 1:
            names = [self._name(place) for place in sorted(self._places)]
            raise ValueError(_different("batches", names))
        return min(self._places, default=self._no_data)

    def _name(self, place: int) -> str:
        return "the end" if place == self._finished else repr(self._job.layers[place].name)


def _succeed(*runs: Callable[[], object]) -> bool:
    """Run passes to their end, interleaved; return whether no exception is raised."""
    passes = [Suspended(run) for run in runs]
    try:
        while None not in [forward.resume() for forward in passes]:
            pass
    except Exception:
        return False
    finally:
        for forward in passes:
            forward.close()
    return True


def _different(who: str, where: list[str]) -> str:
    return (
        f"the {who} come to different layers: some to {where[0]} while others come to "
        f"{' or '.join(where[1:])}; method 'lockstep' needs a forward that calls the same layers "
        "in the same order for every batch; method 'sequential' does not"
    )
