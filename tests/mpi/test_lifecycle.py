"""Exit of jobs and process groups: errors, work in flight, forked children, early ranks."""

from __future__ import annotations

import pytest

from tests.mpi_jobs import Launch, assert_gone


def test_exception_on_one_rank_ends_job(launch: Launch) -> None:
    job = launch(
        "mpich",
        2,
        """
join(seconds=600)
if rank == 1:
    raise ValueError("the error of rank 1")
time.sleep(60)  # only an abort ends this
""",
    )
    assert job.finish() != 0
    assert "ValueError: the error of rank 1" in job.output
    assert_gone(job, 2)


def test_mpi_error_breaks_group_and_job(launch: Launch) -> None:
    """An error raises once; one that no call has raised is printed at exit. Rank 0 exits early."""
    job = launch(
        "openmpi",
        2,
        """
join()
poll_often()
broken, unreported = dist.new_group([0, 1]), dist.new_group([0, 1])
if rank == 0:
    for group in (broken, unreported):
        dist.send(torch.zeros(9), 1, group)
    sys.exit(3)
for call in (
    lambda: dist.recv(torch.zeros(3), 0, broken),
    lambda: dist.barrier(broken),
    dist.barrier,
):
    try:
        call()
    except RuntimeError as error:
        print("caught", error, flush=True)
work = dist.irecv(torch.zeros(5), 0, unreported)
time.sleep(0.5)
""",
    )
    assert job.finish() != 0
    received = "recv from rank 0 #1 ({} float32) on rank 1 of 2 failed: MPI_ERR_TRUNC"
    assert f"caught {received.format(3)}" in job.output
    assert f"caught barrier #1: the process group is broken: {received.format(3)}" in job.output
    assert "caught barrier #1 (0 elements) on rank 1 of 2 lost a rank" in job.output
    assert "rank 0: has left the group" in job.output
    assert received.format(5) in job.output
    assert_gone(job, 2)


@pytest.mark.parametrize(
    ("transport", "end"),
    [
        ("openmpi", ""),
        ("mpich", "from mpi4py import MPI; dist.destroy_process_group(); MPI.Finalize()"),
    ],
)
def test_job_exits_after_work_in_flight(launch: Launch, transport: str, end: str) -> None:
    """Rank 0 holds the store and exits long before ranks 1 and 2.

    Messages without a waiting caller arrive, whether or not the group is destroyed. A forked child
    that called sys.exit waited for the other ranks in MPI_Finalize.
    """
    job = launch(
        transport,
        3,
        f"""
import multiprocessing
from torch.utils.data import DataLoader
join()
poll_often()
pair = dist.new_group([1, 2])
if (child := os.fork()) == 0:
    sys.exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
process = multiprocessing.get_context("fork").Process(target=sys.exit, args=(4,))
process.start()
process.join()
assert process.exitcode == 4
loader = DataLoader(range(4), num_workers=2, multiprocessing_context="fork")
assert sorted(int(batch) for batch in loader) == [0, 1, 2, 3]
x, large = torch.full((3,), float(rank)), torch.full((100_000,), float(rank))
outputs = [torch.zeros(3) for _ in range(3)] if rank == 2 else None
if rank == 2:
    time.sleep(1)
dist.gather(x, outputs, dst=2)
if rank == 0:
    dist.send(x, 1)
if rank == 1:
    dist.recv(x, 0)
    time.sleep(1)
    dist.send(x, 2)
    dist.isend(large, 2)
if rank == 2:
    dist.recv(x)
    print("got", [t[0].item() for t in outputs], x[0].item(), flush=True)
    future = dist.irecv(large, 1).get_future()
    future.then(lambda done: print("at last", done.value()[0].sum().item(), flush=True))
if rank:
    dist.all_reduce(torch.ones(3), async_op=True, group=pair)
{end}
""",
    )
    assert job.finish() == 0, job.output
    assert "got [0.0, 1.0, 2.0] 0.0" in job.output
    assert "at last 100000.0" in job.output
    assert "TCPStore" not in job.output  # no rank uses a closed store
    assert_gone(job, 3)
