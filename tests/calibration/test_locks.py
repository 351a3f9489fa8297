"""Locks held around layers: lockstep must not deadlock."""

from __future__ import annotations

import multiprocessing
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from itertools import chain, islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.calibration.networks import distance, run_batch, set_population_stats, statistics
from tests.calibration.stateful import EQUAL, REPLACED, Layers, SkipOnTheModule, features
from tests.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:lockstep is not possible")
_LOCK = threading.Lock()


def exclusive(lock: Any) -> Callable[[Any], Any]:
    """Return a decorator that holds a lock around a method."""

    def decorate(method: Any) -> Any:
        @wraps(method)
        def locked(*args: Any) -> Any:
            with lock:
                return method(*args)

        return locked

    return decorate


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


class DecoratedForward(Layers):
    @exclusive(threading.Lock())
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class LockInAStack(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(_LOCK)
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
    lock: Any = field(default_factory=threading.Lock)


class LockInASlot(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.guard = Slots()

    def forward(self, x: Tensor) -> Tensor:
        with self.guard.lock:
            return super().forward(x)


@lru_cache
def lock_of(name: str) -> Any:
    return threading.Lock()


class LockOfAFactory(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with lock_of("a"):
            return super().forward(x)


@contextmanager
def locked() -> Iterator[None]:
    lock = lock_of("of a generator")
    with lock:
        yield


class LockInAGenerator(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with locked():
            return super().forward(x)


class LockInADictOfTheClass(Layers):
    locks = {"a": threading.Lock()}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        with self.locks["a"]:
            return super().forward(x)


BLOCKING: dict[str, Callable[[], Layers]] = {
    "lock": lambda: Locked(threading.Lock()),
    "semaphore": lambda: Locked(threading.Semaphore()),
    "semaphore of three": lambda: Locked(threading.BoundedSemaphore(3)),
    "condition": lambda: Locked(threading.Condition(threading.Lock())),
    "lock of processes": lambda: Locked(multiprocessing.Lock()),
    "global": GlobalLock,
    "decorator": DecoratedForward,
    "exit stack": LockInAStack,
    "acquire and release": AcquiredAndReleased,
    "slot": LockInASlot,
    "lru_cache": LockOfAFactory,
    "generator": LockInAGenerator,
    "dict of the class": LockInADictOfTheClass,
}


@pytest.mark.parametrize("name", BLOCKING)
def test_lock_around_layers_does_not_deadlock(name: str) -> None:
    """The second pass waited in the only thread for the lock of the first one."""
    expected, net, batches = BLOCKING[name](), BLOCKING[name](), features()
    set_population_stats(expected, *batches)
    report = syncbn.recalibrate(net, batches, forward=run_batch)
    assert distance(statistics(net), statistics(expected)) < 1e-12
    assert "norms.0: the forward holds a" in report.verification
    assert REPLACED in report.verification


def test_lock_in_forward_argument() -> None:
    """The lock is in a variable of the caller, not in the model."""
    lock, net, expected = threading.Lock(), Layers(), Layers()
    set_population_stats(expected, *features())

    def forward(model: nn.Module, x: Tensor) -> object:
        with lock:
            return model(x)

    report = syncbn.recalibrate(net, iter(features()), forward=forward)
    assert distance(statistics(net), statistics(expected)) < 1e-12
    assert REPLACED in report.verification
    assert not lock.locked()


@pytest.mark.parametrize("kind", [threading.RLock, threading.Condition])
def test_harmless_locks_keep_lockstep(kind: Any) -> None:
    """An RLock is free for its own thread; another thread may hold any lock meanwhile."""
    net = Locked(kind())
    net.guards.append({"of another thread": threading.Lock()})
    net.guards[1]["of another thread"].acquire()
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
    return statistics(net), report.verification, [REPLACED in str(w.message) for w in caught]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", KINDS)
def test_ranks_choose_same_method(job: Ranks, name: str, sizes: str) -> None:
    """A rank with one batch, or none, finds no difference; other ranks must not hang."""
    values = iter(torch.cat(features((30, 30, 30))).split(1))
    parts = [
        tuple(torch.cat([*islice(values, size)]) for size in rank)
        for rank in SIZES[sizes][: job.size]
    ]
    results = job.run(_calibrate_on_ranks, name, parts)
    expected = KINDS[name]()
    set_population_stats(expected, *chain(*parts))
    replaced = name != "clean"
    for rank, (found, verification, warned) in enumerate(results):
        assert distance(found, statistics(expected)) < 1e-9
        assert distance(found, results[0][0]) == 0.0
        assert verification == results[0][1]
        assert (REPLACED in verification) is replaced
        assert warned == ([True] if replaced and rank == 0 else [])
