"""Exact in one pass: all batches wait at a layer until its statistics are those of all of them.

Every layer's input is then the one that the network sees in inference, whatever the batches' size.
The inputs of a layer, of the whole calibration set, are in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from syncbn.calibration.budget import Room
from syncbn.calibration.intercept import intercepted
from syncbn.calibration.job import Job, Sums
from syncbn.calibration.layers import Layer
from syncbn.calibration.settle import Found, add_call, settle
from syncbn.calibration.suspended import Stop, Suspended, stop

# Small inputs are put together up to so many elements: a kernel's call costs as much as these do.
_TOGETHER = 1 << 18


def lockstep(job: Job) -> dict[Layer, Sums]:
    """Return the sums over the inputs of every layer that was reached; the layers use them.

    Raises:
        ValueError: the batches come to different layers; there are none; NaN.
        MemoryError: the suspended passes would not fit.
    """
    return settle(job, partial(_one_pass, job))


def _one_pass(job: Job, held: frozenset[Layer]) -> Found:
    passes = _Passes(job)
    found: Found = {}
    try:
        layer = passes.begin()
        while layer is not None:
            add_call(found, layer, job.total(layer, passes.sums(layer)))
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
        self._stops: list[Stop | None] = []
        self._hooks = ExitStack()
        # What the other ranks are told besides the index of a layer.
        self._finished, self._no_data = len(job.layers), len(job.layers) + 1

    def begin(self) -> Layer | None:
        """Run all passes to the first layer and return it; None if there is none."""
        return self._agree(self._start_all)

    def go_on(self) -> Layer | None:
        """Run all passes to the next layer and return it; None at their end."""
        return self._agree(self._resume_all)

    def sums(self, layer: Layer) -> Sums:
        """Return the sums over this rank's inputs of the layer that the passes have stopped at."""
        inputs = [stop.input for stop in self._stops if stop is not None]
        total, pivot = self._job.nothing(layer), self._job.pivots[layer.index]
        for group in _together([x for x in inputs if len(x)]):
            total = total + Sums.of(group, pivot)
        return total

    def close(self) -> None:
        """End the passes where they are."""
        self._stops.clear()
        for forward in self._passes:
            forward.close()
        self._hooks.close()

    def _start_all(self) -> None:
        job = self._job
        room = Room(job)
        for batch in job.batches:
            room.take(batch)
            if not self._passes:  # before, room has run the model for itself
                self._hooks.enter_context(intercepted(job.layers, stop))
            forward = Suspended(partial(job.run, batch))
            self._passes.append(forward)
            self._stops.append(forward.resume())

    def _resume_all(self) -> None:
        for number, forward in enumerate(self._passes):
            self._stops[number] = None  # or the input would live on
            self._stops[number] = forward.resume()

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
        places = {self._finished if s is None else s.layer.index for s in self._stops}
        if len(places) > 1:
            raise ValueError(_different("batches", [self._name(place) for place in sorted(places)]))
        return places.pop() if places else self._no_data

    def _name(self, place: int) -> str:
        return "the end" if place == self._finished else repr(self._job.layers[place].name)


def _different(who: str, where: list[str]) -> str:
    return (
        f"the {who} come to different layers: some to {where[0]} while others come to "
        f"{' or '.join(where[1:])}; method 'lockstep' needs a forward that calls the same layers "
        "in the same order for every batch; method 'sequential' does not"
    )


def _together(inputs: list[Tensor]) -> Iterator[Tensor]:
    """Yield the inputs in groups of about the same size, each as one tensor."""
    group: list[Tensor] = []
    for x in inputs:
        if group and (
            x.shape[1:] != group[0].shape[1:]
            or x.dtype != group[0].dtype
            or sum(y.numel() for y in group) + x.numel() > _TOGETHER
        ):
            yield _joined(group)
            group = []
        group.append(x)
    if group:
        yield _joined(group)


def _joined(group: list[Tensor]) -> Tensor:
    return group[0] if len(group) == 1 else torch.cat(group)
