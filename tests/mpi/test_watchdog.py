"""Jobs under mpirun with dead, late or missing ranks: errors name the rank, no process remains."""

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

from tests.mpi_jobs import Launch, assert_gone
from tests.ranks import Pool
from tests.transports import MPIS

# Longer than a rank waits before the first check of the watchdog.
LATE = 2.5

TRAIN = """
join()
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
x = torch.randn(4, 3, 8, 8)
model(x)
model = nn.parallel.DistributedDataParallel(syncbn.convert_sync_batchnorm(model))
for step in range(10**6):
    model(x).sum().backward()
    if step == 3:
        sys.stdout.write(f"trains {rank}\\n")
        sys.stdout.flush()
"""


@pytest.mark.parametrize("transport", MPIS)
def test_killed_rank_ends_training_job(launch: Launch, transport: str) -> None:
    job = launch(transport, 3, TRAIN)
    job.read_until("trains", times=3)
    os.kill(job.pids[1], signal.SIGKILL)
    assert job.finish() != 0
    assert "illed" in job.output
    assert_gone(job, 3)


def test_survivors_report_operation_and_killed_rank(launch: Launch) -> None:
    """With an mpirun that keeps survivors running, like the launchers of some clusters."""
    job = launch("openmpi", 3, TRAIN, lenient=True)
    job.read_until("trains", times=3)
    os.kill(job.pids[1], signal.SIGKILL)
    killed = time.monotonic()
    job.finish()
    assert time.monotonic() - killed < 30
    for survivor in (0, 2):
        assert re.search(rf"(all_reduce|broadcast) #\d+ .* on rank {survivor} of 3", job.output), (
            job.output
        )
    assert f"rank 1: has ended (process {job.pids[1]} on" in job.output
    assert_gone(job, 3)


WITHOUT_LAYERS = """
join()
model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
for step in range(10**6):
    if rank == 1 and step == 5:
        os.kill(os.getpid(), 9)
    model(torch.randn(4, 3)).sum().backward()
"""


def test_failed_future_raises_in_backward(launch: Launch) -> None:
    """DDP took the first tensor of an empty list found in the exception, and crashed."""
    job = launch("openmpi", 3, WITHOUT_LAYERS, lenient=True)
    job.finish()
    for survivor in (0, 2):
        assert re.search(rf"all_reduce #\d+ .* on rank {survivor} of 3", job.output), job.output
    assert "Segmentation" not in job.output
    assert_gone(job, 3)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ("time.sleep(60)", "rank 1: has not reached this operation (process"),
        ("sys.exit(0)", "rank 1: has left the group (process"),
        (
            "dist.recv(torch.zeros(3), 0, group_of_all_ranks())",
            "rank 1: is in recv from rank 0 #1 (3 float32)",
        ),
    ],
)
def test_absent_rank_is_named(launch: Launch, others: str, message: str) -> None:
    job = launch(
        "openmpi",
        2,
        f"""
from syncbn.distributed.groups import group_of_all_ranks
join(seconds=4)
if rank == 1:
    {others}
started = time.monotonic()
layer = syncbn.SyncBatchNorm1d(3)
layer.sync_name = "stem"
try:
    layer(torch.randn(2, 3))
finally:
    print("waited", round(time.monotonic() - started), "s", flush=True)
""",
    )
    assert job.finish() != 0
    assert "all_reduce #1 (8 float64) on rank 0 of 2" in job.output
    assert message in job.output
    assert re.search(r"waited [3-7] s", job.output), job.output
    assert_gone(job, 2)


@pytest.mark.parametrize("end", ["dist.destroy_process_group()", "sys.exit(3)"])
def test_rank_that_left_is_named_at_once(launch: Launch, end: str) -> None:
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
    assert "barrier #2 (0 elements) on rank 0 of 2 lost a rank" in job.output, job.output
    assert "rank 1: has left the group" in job.output
    assert re.search(r"waited [1-9] s", job.output), job.output


def test_rank_absent_from_rendezvous_is_named(launch: Launch) -> None:
    job = launch(
        "openmpi",
        3,
        """
join()
if rank == 1:
    time.sleep(60)
dist.new_group([0, 1, 2], timeout=timedelta(seconds=3))
""",
    )
    assert job.finish() != 0
    assert "waited 3 s for ranks [1] to create an MPI process group" in job.output
    assert_gone(job, 3)


def _blocked_store(rank: int) -> bool:
    store = dist.distributed_c10d._get_default_store()
    store.delete_key("go")
    dist.barrier()
    x = torch.ones(3)
    if rank == 0:
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        store.get("go")  # blocks this process's connection until rank 1 has reduced
        work.wait()
    else:
        time.sleep(LATE)
        dist.all_reduce(x)
        store.set("go", "")
    return bool((x == dist.get_world_size()).all())


@pytest.mark.parametrize("transport", MPIS)
def test_blocked_store_does_not_delay_collectives(pool: Pool, transport: str) -> None:
    assert all(pool(2, transport).run(_blocked_store))


def test_stopped_store_process_is_timeout(launch: Launch) -> None:
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
def test_receive_timeout_starts_with_wait(pool: Pool, transport: str) -> None:
    message, received = pool(2, transport).run(_early_receive)[0]
    assert message.endswith("is not done after a wait of 0.5 s")
    assert received == 2.0
