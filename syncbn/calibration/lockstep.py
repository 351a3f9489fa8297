"""Exact in one pass: all batches wait at a layer until its statistics are those of all of them.

Every layer's input is then the one that the network sees in inference, whatever the batches' size.
The inputs of a layer, of the whole calibration set, are in memory together. So small batches may as
well be computed together, if the forward does not decide by what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

from torch import Tensor

from syncbn.calibration.batches import default_forward, put_together
from syncbn.calibration.budget import Room
from syncbn.calibration.intercept import intercepted
from syncbn.calibration.job import Job
from syncbn.calibration.layers import Layer
from syncbn.calibration.samples import Samples
from syncbn.calibration.settle import Found, add_call, settle
from syncbn.calibration.sums import Sums
from syncbn.calibration.suspended import Stop, Suspended, stop


def lockstep(job: Job) -> dict[Layer, Sums]:
    """Return the sums over the inputs of every layer that was reached; the layers use them.

    Raises:
        ValueError: the batches come to different layers; there are none; NaN.
        MemoryError: the suspended passes would not fit.
    """
    # Layers that are called again take more passes.
    job = replace(job, batches=job.batches.kept())
    return settle(job, partial(_one_pass, job))


def _one_pass(job: Job, held: frozenset[Layer]) -> Found:
    passes = _Passes(job)
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
    return found


class _Passes:
    """The forward passes of all batches of this rank, at the same layer as those of all ranks."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._passes: list[Suspended] = []
        self._places: set[int] = set()
        self._samples: Samples | None = None
        self._inputs: list[Tensor] = []
        self._hooks = ExitStack()
        # What the other ranks are told besides the index of a layer.
        self._finished, self._no_data = len(job.layers), len(job.layers) + 1

    def begin(self) -> Layer | None:
        """Run all passes to the first layer and return it; None if there is none."""
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

    def _start_all(self) -> None:
        job = self._job
        rest = iter(job.batches)
        first = list(islice(rest, 1))
        if not first:
            return
        room = Room(job, *first)
        self._hooks.enter_context(intercepted(job.layers, stop))
        batches: Iterable[Any] = chain(first, rest)
        if job.forward is default_forward and not room.reads_data:
            batches = put_together(batches)
        for batch in batches:
            room.take(batch)
            forward = Suspended(partial(job.run, batch))
            self._passes.append(forward)
            self._look(forward.resume())

    def _resume_all(self) -> None:
        self._places.clear()
        for forward in self._passes:
            self._look(forward.resume())

    def _look(self, stop: Stop | None) -> None:
        if stop is None:
            self._places.add(self._finished)
            return
        self._places.add(stop.layer.index)
        if len(self._places) == 1:
            if self._samples is None:
                self._samples = self._job.samples(stop.layer, precise=False)
            self._samples.add(stop.input)  # now, while it is in the cache
            self._inputs.append(stop.input)

    def _agree(self, run: Callable[[], None]) -> Layer | None:
        def work() -> list[int]:
            run()
            return [self._place()]

        places = set(self._job.ranks.together(work, numbers=1).flatten().tolist())
        places.discard(self._no_data)
        if not places:
            raise ValueError("got no batches on any rank; expected at least one")
        if len(places) > 1:
            raise ValueError(_different("ranks", [self._name(place) for place in sorted(places)]))
        place = places.pop()
        return None if place == self._finished else self._job.layers[place]

    def _place(self) -> int:
        if len(self._places) > 1:
            names = [self._name(place) for place in sorted(self._places)]
            raise ValueError(_different("batches", names))
        return min(self._places, default=self._no_data)

    def _name(self, place: int) -> str:
        return "the end" if place == self._finished else repr(self._job.layers[place].name)


def _different(who: str, where: list[str]) -> str:
    return (
        f"the {who} come to different layers: some to {where[0]} while others come to "
        f"{' or '.join(where[1:])}; method 'lockstep' needs a forward that calls the same layers "
        "in the same order for every batch; method 'sequential' does not"
    )
