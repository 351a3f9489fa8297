"""Locks held around layers: lockstep must not deadlock."""

from __future__ import annotations

import multiprocessing
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import pytest
from torch import Tensor, nn

import syncbn
from tests.calibration.networks import compute_population_stats, distance, run_batch, statistics
from tests.calibration.stateful import EQUAL, REPLACED, Layers, SkipOnTheModule, features
from tests.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:lockstep is not possible")
_LOCK = threading.Lock()


class Locked(Layers):
    """Holds a lock of the module around all layers."""

    def __init__(self, lock: Any = None) -> None:
        super().__init__()
        self.guards = [{"lock": lock}]

    def forward(self, x: Tensor) -> Tensor:
        with self.guards[0]["lock"]:
            return super().forward(x)


class GlobalLock(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with _LOCK:
            return super().forward(x)


class AcquiredAndReleased(Layers):
    """No ``finally``: a forward that ends early keeps the lock."""

    shared = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        self.shared.acquire()
        x = super().forward(x)
        self.shared.release()
        return x


@dataclass(slots=True)
class Slots:
    lock: Any


class LockInASlot(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.guard = Slots(threading.Lock())

    def forward(self, x: Tensor) -> Tensor:
        with self.guard.lock:
            return super().forward(x)


@lru_cache
def find_lock(name: str) -> Any:
    return threading.Lock()


class LockOfAFactory(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with find_lock("a"):
            return super().forward(x)


@contextmanager
def hold_lock() -> Iterator[None]:
    with find_lock("of a generator"):
        yield


class LockInAGenerator(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with hold_lock():
            return super().forward(x)


BLOCKING: dict[str, Callable[[], Layers]] = {
    "lock": lambda: Locked(threading.Lock()),
    "semaphore of three": lambda: Locked(threading.BoundedSemaphore(3)),
    "condition": lambda: Locked(threading.Condition(threading.Lock())),
    "lock of processes": lambda: Locked(multiprocessing.Lock()),
    "global": GlobalLock,
    "acquire and release": AcquiredAndReleased,
    "slot": LockInASlot,
    "lru_cache": LockOfAFactory,
    "generator": LockInAGenerator,
}


@pytest.mark.parametrize("name", BLOCKING)
def test_lock_around_layers_does_not_deadlock(name: str) -> None:
    """The second pass waited in the only thread for the lock of the first one."""
    net, batches = BLOCKING[name](), features()
    report = syncbn.recalibrate(net, batches, forward=run_batch)
    assert distance(statistics(net), compute_population_stats(Layers(), *batches)) < 1e-12
    assert "norms.0: the forward holds a" in report.verification
    assert REPLACED in report.verification


def test_lock_in_forward_argument() -> None:
    """The lock is in a closure, not in the model."""
    lock, net = threading.Lock(), Layers()

    def forward(model: nn.Module, x: Tensor) -> object:
        with lock:
            return model(x)

    report = syncbn.recalibrate(net, iter(features()), forward=forward)
    assert distance(statistics(net), compute_population_stats(Layers(), *features())) < 1e-12
    assert REPLACED in report.verification
    assert not lock.locked()


@pytest.mark.parametrize("kind", [threading.RLock, threading.Condition])
def test_harmless_locks_keep_lockstep(kind: Any) -> None:
    """An RLock is free for its own thread; another thread may hold any lock meanwhile."""
    net, other = Locked(kind()), threading.Lock()
    net.guards.append({"of another thread": other})
    other.acquire()
    assert EQUAL in syncbn.recalibrate(net, features(), forward=run_batch).verification


class Lazy(dict[str, Any]):
    """Raises at the first access."""

    def values(self) -> Any:
        raise AssertionError("was read")

    __iter__ = __len__ = values

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise AssertionError("__class__ was read")


def test_lock_search_runs_no_model_code() -> None:
    """Values of a dict and the class of a proxy may run any code."""
    net: Any = Layers()
    net.lazy = [Lazy(a=[Lazy()])]
    assert EQUAL in syncbn.recalibrate(net, features(), forward=run_batch).verification


KINDS: dict[str, Any] = {"skip": SkipOnTheModule, "clean": Layers, "lock": BLOCKING["lock"]}
# Batch sizes of each rank.
SIZES = {"one batch": [(5, 7, 6), (9,), (3,)], "none": [(), (4, 4, 4), ()]}


def _calibrate_on_ranks(rank: int, name: str, parts: list[tuple[Tensor, ...]]) -> Any:
    net = KINDS[name]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = syncbn.recalibrate(net, parts[rank], forward=run_batch)
    return statistics(net), report.verification, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", KINDS)
def test_ranks_choose_same_method(job: Ranks, name: str, sizes: str) -> None:
    """A rank with one batch, or none, finds no difference; other ranks must not hang."""
    shares = SIZES[sizes][: job.size]
    values = features(tuple(map(sum, shares)))
    parts = [x.split(share) if share else () for x, share in zip(values, shares, strict=True)]
    results = job.run(_calibrate_on_ranks, name, parts)
    expected = compute_population_stats(KINDS[name](), *chain(*parts))
    replaced = name != "clean"
    for rank, (found, verification, warned) in enumerate(results):
        assert distance(found, expected) < 1e-9
        assert distance(found, results[0][0]) == 0.0
        assert verification == results[0][1]
        assert (REPLACED in verification) is replaced
        assert warned == ([verification] if replaced and rank == 0 else [])
