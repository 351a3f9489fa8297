"""Waits over mpi4py that look hopeless and are not, and some that are in an unusual way."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.mpi_jobs import MPIS, Launch, assert_gone
from tests.ranks import Pool

# More than a rank waits before it begins to doubt.
LATE = 2.5


def _store_is_busy(rank: int) -> bool:
    store = dist.distributed_c10d._get_default_store()
    store.delete_key("go")
    dist.barrier()
    x = torch.ones(3)
    if rank == 0:
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        store.get("go")  # holds the store's connection of this process until rank 1 has reduced
        work.wait()
    else:
        time.sleep(LATE)
        dist.all_reduce(x)
        store.set("go", "")
    return bool((x == dist.get_world_size()).all())


@pytest.mark.parametrize("transport", MPIS)
def test_a_busy_store_holds_up_no_message(pool: Pool, transport: str) -> None:
    assert all(pool(2, transport).run(_store_is_busy))


def _early_receive(rank: int) -> tuple[str, float]:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=4))
    message = ""
    x = torch.full((3,), 1.0)
    if rank == 0:
        work = dist.irecv(x, 1, group=group)
        assert work is not None
        time.sleep(4.5)  # longer than the group's timeout
        try:
            work.wait(timedelta(seconds=0.5))
        except RuntimeError as error:
            message = str(error)
        dist.barrier()
        work.wait()
    else:
        dist.barrier()
        dist.send(x + 1, 0, group=group)
    dist.destroy_process_group(group)
    return message, x[0].item()


@pytest.mark.parametrize("transport", MPIS)
def test_time_runs_for_a_message_while_somebody_waits(pool: Pool, transport: str) -> None:
    message, received = pool(2, transport).run(_early_receive)[0]
    assert message.endswith("is not done after a wait of 0.5 s")
    assert received == 2.0


def _future_in_a_callback(rank: int) -> float:
    work = dist.all_reduce(torch.ones(3), async_op=True)
    assert work is not None
    first, second = work.get_future(), work.get_future()
    inner: float = first.then(lambda _: second.wait()[0].sum().item()).wait()
    return inner


@pytest.mark.parametrize("transport", MPIS)
def test_a_callback_may_wait_for_the_same_work(pool: Pool, transport: str) -> None:
    assert pool(2, transport).run(_future_in_a_callback) == [6.0, 6.0]


@pytest.mark.parametrize("transport", MPIS)
@pytest.mark.parametrize("end", ["", "dist.destroy_process_group()"])
def test_ranks_may_end_one_after_another(launch: Launch, transport: str, end: str) -> None:
    """Rank 0, which keeps the store, and rank 1 have done their parts long before the others."""
    job = launch(
        transport,
        3,
        f"""
join()
x = torch.full((3,), float(rank))
outputs = [torch.zeros(3) for _ in range(3)] if rank == 2 else None
if rank == 2:
    time.sleep({LATE})
dist.gather(x, outputs, dst=2)
if rank == 0:
    dist.send(x, 1)
if rank == 1:
    dist.recv(x, 0)
    time.sleep({LATE})
    dist.send(x, 2)
if rank == 2:
    dist.recv(x)
    print("got", [t[0].item() for t in outputs], x[0].item(), flush=True)
{end}
""",
    )
    assert job.finish() == 0, job.output
    assert "got [0.0, 1.0, 2.0] 0.0" in job.output
    assert "TCPStore" not in job.output  # nobody talks to a store that is gone
    assert_gone(job, 3)


@pytest.mark.parametrize("end", ["dist.destroy_process_group()", "sys.exit(3)"])
def test_a_rank_that_leaves_too_early_is_named_at_once(launch: Launch, end: str) -> None:
    job = launch(
        "openmpi",
        2,
        f"""
join(seconds=30)
dist.barrier()
if rank == 1:
    {end}
else:
    started = time.monotonic()
    try:
        dist.barrier()
    finally:
        print("waited", round(time.monotonic() - started), "s", flush=True)
""",
    )
    assert job.finish() != 0
    assert "barrier #2 (0 numbers) on rank 0 of 2 lost a rank" in job.output, job.output
    assert "rank 1: has come to its end" in job.output
    assert re.search(r"waited [1-9] s", job.output), job.output


def test_a_stopped_keeper_of_the_store_is_no_hang(launch: Launch) -> None:
    job = launch(
        "openmpi",
        3,
        """
join(seconds=15)
dist.barrier()
sys.stdout.write(f"ready {rank}\\n")
sys.stdout.flush()
if rank == 0:
    time.sleep(100)
dist.barrier()
""",
    )
    job.read_until("ready", times=3)
    os.kill(job.pids[0], signal.SIGSTOP)
    try:
        assert job.finish() != 0
    finally:
        with suppress(ProcessLookupError):
            os.kill(job.pids[0], signal.SIGKILL)
    assert re.search(r"barrier #2 .* is not done after 15\.\d s", job.output), job.output


def test_an_error_that_nobody_waited_for_is_told_at_the_end(launch: Launch) -> None:
    job = launch(
        "openmpi",
        2,
        """
join()
if rank == 0:
    dist.send(torch.zeros(9), 1)
else:
    work = dist.irecv(torch.zeros(3), 0)
    time.sleep(1)
""",
    )
    assert job.finish() != 0
    assert "recv from rank 0 #1 (3 float32) on rank 1 of 2 failed: MPI_ERR_TRUNCATE" in job.output
