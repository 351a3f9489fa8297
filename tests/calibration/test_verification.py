"""Lockstep verifies itself: models whose passes disturb each other get exact statistics, too."""

from __future__ import annotations

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from syncbn.bench.resnet20 import resnet20
from syncbn.calibration.layers import find_layers
from syncbn.calibration.verification import Trace
from tests.calibration.networks import as_they_are, by_hand, distance, network, statistics
from tests.calibration.networks import images as pictures
from tests.ranks import Ranks

EQUAL = "equal those of passes by themselves"
REPLACED = "sequential replaced it"


def data(sizes: tuple[int, ...] = (6,) * 5) -> list[Tensor]:
    """Return batches of features ``[N, 4]`` of different scales."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(size, 4, generator=generator, dtype=torch.float64) * (i + 1) + i
        for i, size in enumerate(sizes)
    ]


class Layers(nn.Module):
    """Three batch-norm layers between linear ones; subclasses keep something meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.inner, self.norms, strict=True):
            x = self.between(norm(linear(x)))
        return x

    def between(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class SkipOnTheModule(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.skip = x
        return super().forward(x)

    def between(self, x: Tensor) -> Tensor:
        return x + self.skip


class CacheOfAForward(Layers):
    """Filled by the first layer of a forward, emptied at its end: the first pass fills it right."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.cache.setdefault("scale", x.std())
        try:
            return super().forward(x)
        finally:
            self.cache.pop("scale", None)

    def between(self, x: Tensor) -> Tensor:
        return x * self.cache["scale"] if "scale" in self.cache else x


class StackOfSkips(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.stack: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.stack.append(x)
        return super().forward(x) + self.stack.pop()

    def between(self, x: Tensor) -> Tensor:
        return x + self.stack[-1]


class QueueOfSkips(Layers):
    """A forward that ends early would leave its input to the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: deque[Tensor] = deque()

    def forward(self, x: Tensor) -> Tensor:
        self.queue.extend([x, x + 1, x + 2])
        return super().forward(x)

    def between(self, x: Tensor) -> Tensor:
        return x + self.queue.popleft()


_SHARED: dict[str, Tensor] = {}


class GlobalVariable(Layers):
    def forward(self, x: Tensor) -> Tensor:
        _SHARED["input"] = x
        return super().forward(x)

    def between(self, x: Tensor) -> Tensor:
        return x * _SHARED["input"].abs()


class Closure(Layers):
    def __init__(self) -> None:
        super().__init__()
        kept = torch.zeros(1)

        def swap(x: Tensor | None = None) -> Tensor:
            nonlocal kept
            kept = kept if x is None else x
            return kept

        self.swap = swap

    def forward(self, x: Tensor) -> Tensor:
        self.swap(x)
        return super().forward(x)

    def between(self, x: Tensor) -> Tensor:
        return x - self.swap()


class RandomAndSkip(SkipOnTheModule):
    """Random numbers must not hide the state."""

    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x + self.skip, 0.0) + 1e-12 * torch.rand_like(x)


STATEFUL = [
    SkipOnTheModule, CacheOfAForward, StackOfSkips, QueueOfSkips, GlobalVariable, Closure,
    RandomAndSkip,
]  # fmt: skip


@pytest.mark.parametrize("one_shot", [False, True], ids=["list", "iterator"])
@pytest.mark.parametrize("sizes", [(6,) * 5, (6, 6, 6, 6, 5), (40, 33)], ids=str)
@pytest.mark.parametrize("forward", [None, as_they_are], ids=["default", "own"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_state_between_layers_does_not_change_the_statistics(
    kind: Callable[[], Layers], forward: Any, sizes: tuple[int, ...], one_shot: bool
) -> None:
    """Interleaved passes read each other's state: variances were off by up to 200 %."""
    expected, net, batches = kind(), kind(), data(sizes)
    by_hand(expected, *batches)
    source: Any = iter(batches) if one_shot else batches
    report = syncbn.recalibrate(net, source, forward=forward)
    assert distance(statistics(net), statistics(expected)) < 1e-9
    assert REPLACED in report.verification or forward is None
    assert report.verification in " ".join(report.table().split())


class TimeMajor(nn.Module):
    """A recurrent network over ``[T, N, C]``: batches as one are longer sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.rnn, self.norm = nn.GRU(4, 6), nn.BatchNorm1d(6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.rnn(x.view(3, -1, 4) if x.dim() == 2 else x)[0]
        y: Tensor = self.norm(h.flatten(0, 1))
        return y


class Halves(Layers):
    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2)
        return super().forward((one - two).abs())


class SpreadOverTheBatch(Layers):
    def between(self, x: Tensor) -> Tensor:
        return x * x.std(0, unbiased=False)


class FixedBatchSize(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(6, 4) if len(x) > 1 else x)


@pytest.mark.parametrize("kind", [TimeMajor, Halves, SpreadOverTheBatch, FixedBatchSize])
def test_batches_are_joined_only_where_this_changes_nothing(kind: Callable[[], Any]) -> None:
    """Small batches were computed as one batch, which is another input for these networks."""
    expected, net, batches = kind(), kind(), data()
    by_hand(expected, *batches)
    report = syncbn.recalibrate(net, batches)
    assert distance(statistics(net), statistics(expected)) < 1e-9
    layers = len(find_layers(net))
    assert report.verification.startswith(f"inputs of {layers} layers for 2 batches {EQUAL}")


def test_batches_whose_first_two_are_equal_are_not_joined_at_last() -> None:
    """The spread over two equal batches is that of one; over more batches it is not."""
    first, _, *rest = data()
    batches = [first, first, *rest]
    expected, net = SpreadOverTheBatch(), SpreadOverTheBatch()
    by_hand(expected, *batches)
    report = syncbn.recalibrate(net, batches)
    assert distance(statistics(net), statistics(expected)) < 1e-9
    assert EQUAL in report.verification


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
}


@pytest.mark.parametrize("name", BLOCKING)
def test_a_lock_around_layers_is_no_hang(name: str) -> None:
    """The second pass waited in the only thread for the lock that the first one held."""
    expected, net, batches = BLOCKING[name](), BLOCKING[name](), data()
    by_hand(expected, *batches)
    report = syncbn.recalibrate(net, batches, forward=as_they_are)
    assert distance(statistics(net), statistics(expected)) < 1e-12
    assert "norms.0: the forward holds a" in report.verification
    assert REPLACED in report.verification


def test_a_lock_in_the_forward_argument() -> None:
    """The lock is in a variable of the caller, not in the model."""
    lock, net, expected = threading.Lock(), Layers(), Layers()
    by_hand(expected, *data())

    def forward(model: nn.Module, x: Tensor) -> object:
        with lock:
            return model(x)

    report = syncbn.recalibrate(net, data(), forward=forward)
    assert distance(statistics(net), statistics(expected)) < 1e-12
    assert REPLACED in report.verification
    assert not lock.locked()


@pytest.mark.parametrize("lock", [threading.RLock(), threading.Condition(), threading.Lock()])
def test_locks_that_block_no_pass_are_no_reason(lock: Any) -> None:
    """An RLock is free for its own thread; another thread may hold any lock meanwhile."""
    net = Locked(lock if not isinstance(lock, type(threading.Lock())) else threading.RLock())
    net.guards.append({"of another thread": threading.Lock()})
    net.guards[1]["of another thread"].acquire()
    assert EQUAL in syncbn.recalibrate(net, data(), forward=as_they_are).verification


class Noise(Layers):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=True) + torch.randn_like(x)


@pytest.mark.parametrize("one_shot", [False, True])
def test_random_forwards_are_no_false_alarm(one_shot: bool) -> None:
    """Other passes draw numbers in between, so a pass by itself would draw others."""
    net, batches = Noise(), data()
    report = syncbn.recalibrate(net, iter(batches) if one_shot else batches)
    assert EQUAL in report.verification


@pytest.mark.parametrize("batch_size", [1, 4, 24])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float64, None), (torch.float32, None), (torch.bfloat16, None),
        (torch.float16, None), (torch.float32, torch.bfloat16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [network, resnet20])
def test_rounding_is_no_false_alarm(
    make: Any, dtype: torch.dtype, autocast: torch.dtype | None, batch_size: int
) -> None:
    """Kernels round differently for another batch size."""
    net = make().to(dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        report = syncbn.recalibrate(net, pictures(24, dtype).split(batch_size))
    assert EQUAL in report.verification or batch_size == 24
    assert REPLACED not in report.verification


def test_one_batch_needs_no_comparison() -> None:
    calls: list[int] = []
    net = network()
    net.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    report = syncbn.recalibrate(net, [pictures()])
    assert report.verification == "a single batch on each rank; nothing was interleaved"
    assert calls == [1, 24]
    assert syncbn.recalibrate(net, [pictures()], method="sequential").verification == ""


class Once:
    """Re-iterable by its looks, with other batches in every pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield from data()[: 4 + self.passes % 2]


def test_data_that_sequential_cannot_take_is_an_error() -> None:
    """Statistics that lockstep got wrong must not stay."""
    net = SkipOnTheModule()
    before = statistics(net)
    message = r"lockstep is not possible \(norms.1: the input differs by .*failed: .*the same data"
    with pytest.raises(ValueError, match=message):
        syncbn.recalibrate(net, Once(), forward=as_they_are)
    assert distance(statistics(net), before) == 0.0


class InPlace(Layers):
    """Normalizes its input, and overwrites the input of a layer after it."""

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(1.0).mul_(0.5)
        return super().forward(x)

    def between(self, x: Tensor) -> Tensor:
        return x

    def double_norm(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("method", ["lockstep", "sequential", "pooled"])
def test_a_forward_that_writes_to_its_input(method: Any) -> None:
    """A batch that ran twice was normalized twice, and the caller's data changed."""
    net, expected, batches = InPlace(), Layers(), data()
    expected.between = lambda x: x  # type: ignore[method-assign]
    if method == "pooled":
        syncbn.recalibrate(expected, [(x - 1) * 0.5 for x in batches], method=method)
    else:
        by_hand(expected, *((x - 1) * 0.5 for x in batches))
    report = syncbn.recalibrate(net, batches, method=method)
    assert distance(statistics(net), statistics(expected)) < 1e-12
    assert torch.equal(torch.cat(batches), torch.cat(data()))
    assert EQUAL in report.verification or method != "lockstep"


class OverwritesALayersInput(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inner[0](x)
        y: Tensor = self.norms[0](x)
        x.zero_()
        return y


@pytest.mark.parametrize("method", ["lockstep", "sequential", "pooled"])
def test_a_layer_whose_input_is_overwritten_after_it(method: Any) -> None:
    """Statistics of inputs ``[N, C]`` shared their memory and were read too late."""
    net = OverwritesALayersInput()
    with torch.no_grad():
        values = torch.cat([net.inner[0](x) for x in data()])
    syncbn.recalibrate(net, data(), method=method, forward=as_they_are)
    torch.testing.assert_close(net.norms[0].running_var, values.var(0))
    torch.testing.assert_close(net.norms[0].running_mean, values.mean(0))


def test_a_trace_does_not_grow_with_the_batch() -> None:
    layer = find_layers(nn.BatchNorm1d(4))[0]
    trace = Trace(None, 0, 500, 1000)
    trace.add(layer, torch.arange(1000.0)[:, None].expand(1000, 4))
    rows = trace.entries[0][1].mean[:, 0]
    assert len(rows) <= 32
    assert rows[0] == 0
    assert 480 <= rows[-1] < 500


def _on_ranks(rank: int, name: str, sizes: list[tuple[int, ...]]) -> Any:
    kinds: dict[str, Any] = {"skip": SkipOnTheModule, "clean": Layers, **BLOCKING}
    net = kinds[name]()
    start = sum(sum(part) for part in sizes[:rank])
    mine = torch.cat(data((30, 30, 30)))[start:].split([*sizes[rank], 90 - start - sum(sizes[rank])])
    report = syncbn.recalibrate(net, list(mine[:-1]), forward=as_they_are)
    return statistics(net), report.verification


@pytest.mark.parametrize("sizes", [[(5, 7, 6), (9,)], [(), (4, 4, 4)], [(3, 8), (8, 3)]], ids=str)
@pytest.mark.parametrize("name", ["skip", "lock", "clean"])
def test_ranks_decide_alike(
    two_ranks: Ranks, name: str, sizes: list[tuple[int, ...]]
) -> None:
    """A rank with one batch, or none, sees no difference; the others must not wait for it."""
    results = two_ranks.run(_on_ranks, name, sizes)
    assert results[0][1] == results[1][1]
    assert (REPLACED in results[0][1]) is (name != "clean")
    assert distance(results[0][0], results[1][0]) == 0.0
    expected = BLOCKING[name]() if name == "lock" else SkipOnTheModule()
    if name == "clean":
        expected = Layers()
    values = torch.cat(data((30, 30, 30)))
    parts = [size for part in sizes for size in part]
    by_hand(expected, *values[: sum(parts)].split(parts))
    assert distance(results[0][0], statistics(expected)) < 1e-9
