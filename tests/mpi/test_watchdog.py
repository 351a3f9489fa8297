"""Dead, late or absent ranks: errors name the rank and its operation, no process remains."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import syncbn
from tests.mpi_jobs import Launch, assert_gone
from tests.ranks import Pool, Ranks
from tests.transports import MPIS

TRAIN = """
join()
model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
model = nn.parallel.DistributedDataParallel(syncbn.convert_sync_batchnorm(model))
for step in range(10**6):
    model(torch.randn(4, 3)).sum().backward()
    if step == 3:
        write(f"trains {rank}")
"""


@pytest.mark.parametrize("transport", MPIS)
def test_killed_rank_ends_training_job(launch: Launch, transport: str) -> None:
    job = launch(transport, 2, TRAIN)
    job.read_until("trains", times=2)
    os.kill(job.pids[1], signal.SIGKILL)
    assert job.finish() != 0
    assert "illed" in job.output
    assert_gone(job, 2)


def test_survivors_report_operation_and_killed_rank(launch: Launch) -> None:
    """With an mpirun that keeps survivors running, like the launchers of some clusters.

    The error arrives in a future; DDP took the first tensor of an empty list found in the
    exception, and crashed.
    """
    job = launch(
        "openmpi",
        3,
        """
join()
model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
for step in range(10**6):
    if rank == 1 and step == 5:
        write("dies")
        os.kill(os.getpid(), 9)
    model(torch.randn(4, 3)).sum().backward()
""",
        lenient=True,
    )
    job.read_until("dies", times=1)
    killed = time.monotonic()
    job.finish()
    assert time.monotonic() - killed < 30
    for survivor in (0, 2):
        assert re.search(rf"all_reduce #\d+ .* on rank {survivor} of 3", job.output), job.output
    assert f"rank 1: has ended (process {job.pids[1]} on" in job.output
    assert "Segmentation" not in job.output
    assert_gone(job, 3)


def _wait_for_rank_1(rank: int, state: str, seconds: float) -> tuple[str, float]:
    """Return the error of a layer on rank 0, whose all-reduce rank 1 never joins, and its time."""
    group: Any = dist.new_group([0, 1])
    message, start = "", time.monotonic()
    leaves = rank == 1 and state == "has left the group"
    if rank == 0:
        group.set_timeout(timedelta(seconds=seconds))
        with pytest.raises(RuntimeError) as caught:
            syncbn.SyncBatchNorm1d(3, process_group=group)(torch.randn(2, 3))
        message = str(caught.value)
    elif leaves:
        dist.destroy_process_group(group)
    elif rank == 1 and state.startswith("is in recv"):
        with pytest.raises(RuntimeError, match="was given up by another rank"):
            dist.recv(torch.zeros(3), 0, group)
    waited = time.monotonic() - start
    dist.barrier()
    if rank < 2 and not leaves:  # torch names later groups after the number of groups
        dist.destroy_process_group(group)
    return message, waited


@pytest.mark.parametrize(
    ("state", "timeout", "reason"),
    [
        ("has not reached this operation", 1, r"is not done after 1\.\d s \(timeout 1 s\)"),
        ("is in recv from rank 0 #1 (3 float32)", 1, "is not done after 1"),
        ("has left the group", 15, "lost a rank"),
    ],
)
def test_absent_rank_is_named(pool: Pool, state: str, timeout: float, reason: str) -> None:
    message, waited = pool(3, "openmpi").run(_wait_for_rank_1, state, timeout)[0]
    assert re.search(rf"all_reduce #1 \(8 float64\) on rank 0 of 2 {reason}", message), message
    assert message.startswith("SyncBatchNorm1d(3) forward, torch.float32 input: the all-reduce of")
    assert f"rank 1: {state}" in message
    assert waited < 10


def _reduce_with_blocked_store(rank: int) -> bool:
    store = dist.distributed_c10d._get_default_store()
    store.delete_key("go")
    dist.barrier()
    x = torch.ones(3)
    if rank == 0:
        work: Any = dist.all_reduce(x, async_op=True)
        store.get("go")  # blocks this process's connection until rank 1 has reduced
        work.wait()
    else:
        time.sleep(0.5)  # the watchdog of rank 0 polls meanwhile
        dist.all_reduce(x)
        store.set("go", "")
    return bool((x == dist.get_world_size()).all())


def test_blocked_store_does_not_delay_collectives(three_mpi_ranks: Ranks) -> None:
    assert all(three_mpi_ranks.run(_reduce_with_blocked_store))


def test_stopped_store_process_is_timeout(launch: Launch) -> None:
    job = launch(
        "openmpi",
        3,
        """
join()
dist.barrier()
write(f"ready {rank}")
if rank == 0:
    time.sleep(100)
dist.barrier(timeout=timedelta(seconds=2))
""",
    )
    job.read_until("ready", times=3)
    os.kill(job.pids[0], signal.SIGSTOP)
    try:
        assert job.finish() != 0
    finally:
        with suppress(ProcessLookupError):
            os.kill(job.pids[0], signal.SIGKILL)
    assert re.search(r"barrier #2 .* is not done after 2\.\d s", job.output), job.output


def _receive_late(rank: int) -> tuple[str, float]:
    group: Any = dist.new_group([0, 1])
    message, x = "", torch.ones(3)
    if rank == 0:
        group.set_timeout(timedelta(seconds=0.3))
        work: Any = dist.irecv(x, 1, group=group)
        time.sleep(0.5)  # longer than the group's timeout
        with pytest.raises(RuntimeError) as caught:
            work.wait(timedelta(seconds=0.1))
        message = str(caught.value)
        group.set_timeout(timedelta(seconds=10))
        dist.barrier()
        work.wait()
    else:
        dist.barrier()
        if rank == 1:
            dist.send(x + 1, 0, group=group)
    if rank < 2:
        dist.destroy_process_group(group)
    return message, x[0].item()


def test_receive_timeout_starts_with_wait(pool: Pool) -> None:
    message, received = pool(3, "openmpi").run(_receive_late)[0]
    assert re.search(r"is not done after a wait of \d+\.\d s$", message), message
    assert received == 2.0
