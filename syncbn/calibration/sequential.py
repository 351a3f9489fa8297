"""Exact in the memory of one batch: a pass over the data for every layer, up to that layer.

The layers before it already use their population statistics, so the result is that of ``lockstep``.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice

from torch import Tensor

from syncbn.calibration.batches import Batches, count_samples
from syncbn.calibration.intercept import intercepted
from syncbn.calibration.job import Job
from syncbn.calibration.layers import Layer
from syncbn.calibration.randomness import same_randomness
from syncbn.calibration.settle import Found, Input, settle
from syncbn.calibration.sums import Sums
from syncbn.calibration.wrappers import is_fully_sharded


def sequential(job: Job, whole_forwards: bool = False) -> dict[Layer, Sums]:
    """Return the sums over the inputs of every layer that was reached; the layers use them.

    Args:
        job: the calibration.
        whole_forwards: True to run forwards to their end. A forward that ends early may leave
            state behind, such as an entry of a queue or an acquired lock.

    Raises:
        ValueError: the batches come only once, or differ from pass to pass; there are none; NaN;
            two layers come in either order.
    """
    job.ranks.agreed(partial(_refuse_one_shot, job.batches))
    return settle(job, partial(_cycle, job, _Data(), whole_forwards))


def _refuse_one_shot(batches: Batches) -> None:
    if batches.is_one_shot:
        raise ValueError(
            f"method 'sequential' reads the batches once for every layer; got a one-shot "
            f"{type(batches.source).__name__}; expected a list, a DataLoader or another "
            "iterable that can be read again (method='lockstep' reads them once)"
        )


@dataclass
class _Data:
    """What this rank's batches are, in every pass: set by the first.

    Attributes:
        size: batches, and samples in them; None before.
    """

    size: tuple[int, int] | None = None

    def check(self, batches: int, samples: int) -> None:
        """Compare a pass with the first.

        Raises:
            ValueError: it had other numbers.
        """
        if self.size not in (None, (batches, samples)):
            raise ValueError(
                f"method 'sequential' got {self.size} batches and samples in a pass, and "
                f"({batches}, {samples}) in a later one; expected the same data in every pass "
                "(method='lockstep' reads it once)"
            )
        self.size = batches, samples


def _cycle(job: Job, data: _Data, whole_forwards: bool, held: frozenset[Layer]) -> Found:
    order, calls = _first_order(job)
    waiting = [layer for layer in order if layer not in held]
    postponed: set[Layer] = set()
    found: Found = {}
    while waiting:
        target = waiting[0]
        look = _Pass(job, data, {target}, {*found, *held}, waiting, postponed)
        look.to_the_end = whole_forwards or len(waiting) == 1 or calls[target.index] > 1
        before, after, times = look.run()
        if before is not None:
            if before in postponed:
                raise ValueError(
                    f"{before.name} and {target.name}: some batches come to one first and some to "
                    "the other; method 'sequential' needs an order of the layers"
                )
            postponed.add(target)
            waiting = [before, *(layer for layer in waiting if layer is not before)]
            continue
        found[target] = Input(job.total(target, look.samples[target]), times)
        target.use_moments(found[target].sums.moments)
        postponed.discard(target)
        waiting.remove(target)
        if after is not None:
            waiting.append(after)
        job.report_progress(len(found), len(found) + len(waiting))
    if held:
        look = _Pass(job, data, held, held.union(found))
        look.run()
        for layer in sorted(held, key=lambda layer: layer.index):
            found[layer] = Input(job.total(layer, look.samples[layer]), calls[layer.index])
    return found


def _first_order(job: Job) -> tuple[list[Layer], list[int]]:
    """Return the layers in the order of the first batch, and how often it calls each layer."""
    order: list[int] = []

    def look(layer: Layer, x: Tensor) -> None:
        order.append(layer.index)

    def work() -> list[int]:
        with same_randomness(job.batches.source), intercepted(job.layers, look):
            has_batch = False
            for batch in islice(job.batches, 1):
                job.run(batch)
                has_batch = True
        firsts = list(dict.fromkeys(order))
        places = [firsts.index(i) + 1 if i in firsts else 0 for i in range(len(job.layers))]
        return [int(has_batch), *places, *(order.count(i) for i in range(len(job.layers)))]

    rows = job.ranks.together(work, numbers=1 + 2 * len(job.layers))
    with_data = [row[1:].tolist() for row in rows if row[0]]
    if not with_data:
        raise ValueError("got no batches on any rank; expected at least one")
    places, calls = with_data[0][: len(job.layers)], with_data[0][len(job.layers) :]
    met = [layer for layer in job.layers if places[layer.index]]
    return sorted(met, key=lambda layer: places[layer.index]), calls


class _EnoughError(BaseException):
    """Ends a forward at a layer; no Exception, which the forward may handle."""


class _Pass:
    """A pass over the data.

    Args:
        job: the calibration.
        data: what the batches of every pass are.
        wanted: layers whose inputs are summed up.
        known: layers that have their population statistics.
        waiting: layers whose turn comes later.
        postponed: those of them that come after the wanted one where it comes at all.
    """

    def __init__(
        self,
        job: Job,
        data: _Data,
        wanted: Collection[Layer],
        known: Collection[Layer],
        waiting: Collection[Layer] = (),
        postponed: Collection[Layer] = (),
    ) -> None:
        self.samples = {layer: job.samples(layer, precise=False) for layer in wanted}
        #: Run whole forwards, to see calls and layers after the wanted one.
        self.to_the_end = not waiting
        self._job = job
        self._data = data
        self._known = known
        self._waiting = waiting
        self._postponed = postponed
        self._passed: Layer | None = None
        self._before: Layer | None = None
        self._after: Layer | None = None
        self._calls = self._most_calls = 0

    def run(self) -> tuple[Layer | None, Layer | None, int]:
        """Run it on all ranks.

        Returns:
            A layer that is not known and comes before the wanted one; one that comes after it and
            is nobody's turn; how often a forward calls the wanted layer.
        """
        numbers = self._job.ranks.together(self._work, numbers=3).amax(0).tolist()
        before, after = (self._job.layers[n - 1] if n else None for n in numbers[:2])
        return before, after, numbers[2]

    def _work(self) -> list[int]:
        job = self._job
        # Those who do not stop in the middle must not: FSDP would not know where it is.
        sharded = any(is_fully_sharded(module) for module in job.model.modules())
        self.to_the_end = self.to_the_end or sharded
        self._read_all()
        if any(samples.must_be_precise() for samples in self.samples.values()):
            self.samples = {layer: job.samples(layer) for layer in self.samples}
            self._read_all()
        indices = [0 if x is None else x.index + 1 for x in (self._before, self._after)]
        return [*indices, self._most_calls]

    def _read_all(self) -> None:
        job = self._job
        batches = samples = 0
        with same_randomness(job.batches.source), intercepted(job.layers, self._look):
            for batch in job.batches:
                self._calls, self._passed = 0, None
                with suppress(_EnoughError):
                    job.run(batch)
                if self._before is not None:
                    return
                batches += 1
                samples += count_samples(batch) or 0
        self._data.check(batches, samples)

    def _look(self, layer: Layer, x: Tensor) -> None:
        if layer in self.samples:
            if self._passed is not None:
                self._before = self._passed
                raise _EnoughError
            self._calls += 1
            self._most_calls = max(self._calls, self._most_calls)
            self.samples[layer].add(x)
            if not self.to_the_end:
                raise _EnoughError
        elif layer not in self._known:
            if layer in self._postponed and not self._calls:
                self._passed = layer  # fine, if the wanted one does not come any more
            elif not self._calls and self._passed is None:
                self._before = layer
                raise _EnoughError
            elif self._calls and layer not in self._waiting:
                self._after = layer
