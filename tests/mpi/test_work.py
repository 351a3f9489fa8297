"""Operations in flight: memory lifetime, order, threads and callbacks."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.mpi.conformance import create_groups
from tests.ranks import Ranks

NUMEL = 20_000
#: Written to memory that the operations should keep alive.
GARBAGE = 77.0


def _full(value: float, dtype: torch.dtype, numel: int = NUMEL) -> Tensor:
    return torch.full((numel,), value, dtype=dtype)


def _starts(rank: int, dtype: torch.dtype) -> Iterator[Any]:
    """Start operations on tensors without other references; all results are 6."""
    mine = _full(rank + 1, dtype)
    yield dist.all_reduce(mine.clone(), async_op=True)
    yield dist.all_reduce(_full(rank + 1, dtype, 2 * NUMEL)[::2], async_op=True)
    yield dist.reduce_scatter(_full(0, dtype), [mine.clone() for _ in range(3)], async_op=True)
    yield dist.broadcast(_full(6 if rank == 1 else 0, dtype), 1, async_op=True)
    parts = [_full(6, dtype) for _ in range(3)]
    yield dist.scatter(_full(0, dtype), parts if rank == 2 else None, src=2, async_op=True)
    del parts
    output, tensor = _full(0, dtype, 3 * NUMEL), _full(6, dtype, 3 * NUMEL)
    yield dist.all_to_all_single(output, tensor, async_op=True)


def _drop_references(rank: int) -> list[bool]:
    futures = []
    for dtype in (torch.float32, torch.bfloat16):
        for work in _starts(rank, dtype):
            futures.append(work.get_future())
            del work
            for numel in (NUMEL, 2 * NUMEL, 3 * NUMEL):
                _full(GARBAGE, torch.float32, numel)
                _full(GARBAGE, torch.bfloat16, numel)
    return [bool((future.wait()[0] == 6).all()) for future in futures]


def test_memory_outlives_references(three_mpi_ranks: Ranks) -> None:
    assert three_mpi_ranks.run(_drop_references) == [[True] * 12] * 3


def _wait_in_random_order(rank: int) -> bool:
    started = []
    for number in range(40):
        for group, members in create_groups():
            tensor = _full(rank + number, torch.float32, 100 + number)
            expected = sum(members) + len(members) * number
            work: Any = dist.all_reduce(tensor, group=group, async_op=True)
            started.append((work, tensor, expected))
    random.Random(rank).shuffle(started)
    return all(work.wait() and bool((x == expected).all()) for work, x, expected in started)


def test_waits_in_random_order(three_mpi_ranks: Ranks) -> None:
    assert all(three_mpi_ranks.run(_wait_in_random_order))


def _run_threads(function: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=function, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _two_threads(rank: int) -> list[set[float]]:
    groups = [dist.new_group([0, 1, 2]) for _ in range(2)]
    seen: list[set[float]] = [set(), set()]

    def add(number: int) -> None:
        for _ in range(100):
            tensor = torch.full((50,), float(10**number))
            dist.all_reduce(tensor, group=groups[number])
            seen[number].update(tensor.tolist())

    _run_threads(add, 2)
    return seen


def test_threads_use_separate_groups(three_mpi_ranks: Ranks) -> None:
    assert three_mpi_ranks.run(_two_threads) == [[{3.0}, {30.0}]] * 3


def _wait_in_threads(rank: int) -> list[float]:
    tensor = torch.full((NUMEL,), float(rank))
    if rank == 2:
        time.sleep(0.1)
    work: Any = dist.all_reduce(tensor, async_op=True)
    seen: list[float] = []

    def wait(_: int) -> None:
        work.wait()
        seen.extend((tensor.min().item(), tensor.max().item()))

    _run_threads(wait, 4)
    return seen


def test_several_threads_wait_for_one_work(three_mpi_ranks: Ranks) -> None:
    assert three_mpi_ranks.run(_wait_in_threads) == [[3.0] * 8] * 3


def _reduce_in_callback(rank: int) -> list[float]:
    # Like torch's PowerSGD hook. Rank 2 is late, so that no operation completes at once.
    if rank == 2:
        time.sleep(0.05)
    first: Any = dist.all_reduce(torch.ones(3), async_op=True)

    def again(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        second: Any = dist.all_reduce(done.value()[0], async_op=True)
        result: Tensor = second.get_future().wait()[0]
        return result

    values: list[float] = first.get_future().then(again).wait().tolist()
    return values


def test_callback_waits_for_another_work(three_mpi_ranks: Ranks) -> None:
    assert three_mpi_ranks.run(_reduce_in_callback) == [[9.0] * 3] * 3


def _future_in_callback(rank: int) -> float:
    work: Any = dist.all_reduce(torch.ones(3), async_op=True)
    first, second = work.get_future(), work.get_future()
    inner: float = first.then(lambda _: second.wait()[0].sum().item()).wait()
    return inner


def test_callback_waits_for_same_work(three_mpi_ranks: Ranks) -> None:
    assert three_mpi_ranks.run(_future_in_callback) == [9.0] * 3


def _wait_with_timeout(rank: int) -> bool:
    tensor = torch.full((NUMEL,), float(rank))
    if rank == 2:
        time.sleep(0.3)
    work: Any = dist.all_reduce(tensor, async_op=True)
    if rank != 2:
        with pytest.raises(RuntimeError, match=r"all_reduce .* is not done after a wait of 0.\d s"):
            work.wait(timedelta(milliseconds=20))
        assert not work.is_completed()
    assert work.wait(timedelta(seconds=10))
    assert work.is_success()
    assert work.result()[0] is tensor
    assert work.exception() is None
    return bool((tensor == 3).all())


def test_work_continues_after_wait_timeout(three_mpi_ranks: Ranks) -> None:
    assert all(three_mpi_ranks.run(_wait_with_timeout))


def _future_after_many_waits(rank: int) -> bool:
    between = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(2000):
            work: Any = dist.all_reduce(torch.ones(1), async_op=True)
            work.wait()
    finally:
        sys.setswitchinterval(between)
    last: Any = dist.all_reduce(torch.ones(1), async_op=True)
    future = last.get_future()
    deadline = time.monotonic() + 10
    while not future.done() and time.monotonic() < deadline:
        time.sleep(1e-3)
    return bool(future.done())


def test_future_completes_after_many_waits(three_mpi_ranks: Ranks) -> None:
    """The progress thread and callers of wait remove operations from the same queue."""
    assert three_mpi_ranks.run(_future_after_many_waits) == [True] * 3


def _fail_to_start_second(rank: int) -> list[float]:
    group = dist.group.WORLD
    assert group is not None
    for _ in range(10):
        half = _full(rank + 1, torch.float16)
        tensors = [half, torch.ones(2).to(torch.float8_e4m3fn)]
        with pytest.raises(TypeError, match=r"float8_e4m3fn with SUM"):
            group.allreduce_coalesced(tensors)
        del half, tensors
        _full(GARBAGE, torch.float32)
    values = torch.ones(3)
    dist.all_reduce(values)
    return values.tolist()


def test_group_works_after_second_of_two_fails_to_start(three_mpi_ranks: Ranks) -> None:
    assert three_mpi_ranks.run(_fail_to_start_second) == [[3.0] * 3] * 3
