"""Exit of jobs and process groups: errors, work in flight, forked children, early ranks."""

from __future__ import annotations

import pytest

from tests.mpi_jobs import Launch, assert_gone
from tests.transports import MPIS

# Longer than a rank waits before the first check of the watchdog.
LATE = 2.5


@pytest.mark.parametrize("transport", MPIS)
def test_exception_on_one_rank_ends_job(launch: Launch, transport: str) -> None:
    job = launch(
        transport,
        2,
        """
join(seconds=600)
if rank == 1:
    raise ValueError("the error of rank 1")
dist.barrier()
""",
    )
    assert job.finish() != 0
    assert "ValueError: the error of rank 1" in job.output
    assert_gone(job, 2)


def test_mpi_error_raises_and_breaks_group(launch: Launch) -> None:
    job = launch(
        "openmpi",
        2,
        """
join()
try:
    if rank == 0:
        dist.send(torch.zeros(9), 1)
    else:
        dist.recv(torch.zeros(3), 0)
except RuntimeError as error:
    print("caught", error, flush=True)
    try:
        dist.barrier()
    except RuntimeError as error:
        print("then", error, flush=True)
""",
    )
    assert job.finish() != 0
    assert "caught recv from rank 0 #1 (3 float32) on rank 1 of 2 failed: MPI_ERR_TRUNC" in (
        job.output
    )
    assert "then barrier #1: the process group is broken: recv from rank 0 #1" in job.output
    assert_gone(job, 2)


def test_unreported_error_is_printed_at_exit(launch: Launch) -> None:
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


@pytest.mark.parametrize("transport", MPIS)
@pytest.mark.parametrize("end", ["dist.destroy_process_group()", "", "MPI.Finalize()"])
def test_exit_completes_work_in_flight(launch: Launch, transport: str, end: str) -> None:
    """Messages without a waiting caller arrive, whether or not the group is destroyed."""
    job = launch(
        transport,
        2,
        f"""
from mpi4py import MPI
join()
x = torch.full((100_000,), float(rank))
work = dist.isend(x, 1) if rank == 0 else dist.irecv(x, 0)
dist.all_reduce(torch.ones(3), async_op=True)
group = dist.new_group([0, 1])
dist.all_reduce(torch.ones(3), group=group, async_op=True)
if rank == 1:
    work.get_future().then(lambda future: print("got", future.value()[0].sum().item(), flush=True))
if "{end}" == "MPI.Finalize()":
    dist.destroy_process_group()
{end}
""",
    )
    assert job.finish() == 0, job.output
    assert "got 0.0" in job.output
    assert_gone(job, 2)


@pytest.mark.parametrize("transport", MPIS)
@pytest.mark.parametrize("end", ["", "dist.destroy_process_group()"])
def test_ranks_may_exit_at_different_times(launch: Launch, transport: str, end: str) -> None:
    """Rank 0, which holds the store, and rank 1 finish long before rank 2."""
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
    assert "TCPStore" not in job.output  # no rank uses a closed store
    assert_gone(job, 3)


@pytest.mark.parametrize("transport", MPIS)
def test_forked_children_exit(launch: Launch, transport: str) -> None:
    """A child that called sys.exit waited for the other ranks in MPI_Finalize."""
    job = launch(
        transport,
        2,
        """
import multiprocessing
from torch.utils.data import DataLoader
join()
dist.all_reduce(torch.ones(3))
if (child := os.fork()) == 0:
    sys.exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
process = multiprocessing.get_context("fork").Process(target=sys.exit, args=(4,))
process.start()
process.join()
assert process.exitcode == 4
loader = DataLoader(range(4), num_workers=2, multiprocessing_context="fork")
assert sorted(int(batch) for batch in loader) == [0, 1, 2, 3]
dist.barrier()
print("ended", flush=True)
""",
    )
    job.read_until("ended", times=2)
    assert job.finish() == 0, job.output
    assert_gone(job, 2)
