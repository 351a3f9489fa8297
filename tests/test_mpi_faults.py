"""What goes wrong under mpirun: every rank gets an error that says what, and no process stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import transports
from tests.mpi_jobs import MPIS, Launch, assert_gone

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
def test_kill_of_a_rank_ends_a_training_job(launch: Launch, transport: str) -> None:
    job = launch(transport, 3, TRAIN)
    job.read_until("trains", times=3)
    os.kill(job.pids[1], signal.SIGKILL)
    assert job.finish() != 0
    assert "illed" in job.output
    assert_gone(job, 3)


def test_survivors_of_a_kill_name_the_operation_and_the_rank(launch: Launch) -> None:
    """An mpirun that lets survivors live, as the launchers of some clusters do."""
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


def test_an_error_of_a_future_is_an_error_of_backward(launch: Launch) -> None:
    """DDP took the first of the tensors that it found in the exception, of none, and crashed."""
    job = launch("openmpi", 3, WITHOUT_LAYERS, lenient=True)
    job.finish()
    for survivor in (0, 2):
        assert re.search(rf"all_reduce #\d+ .* on rank {survivor} of 3", job.output), job.output
    assert "Segmentation" not in job.output
    assert_gone(job, 3)


@pytest.mark.parametrize("transport", MPIS)
def test_an_exception_on_one_rank_ends_the_job(launch: Launch, transport: str) -> None:
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


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ("time.sleep(60)", "rank 1: has not come to this operation (process"),
        ("sys.exit(0)", "rank 1: has come to its end (process"),
        (
            "dist.recv(torch.zeros(3), 0, group_of_all_ranks())",
            "rank 1: is in recv from rank 0 #1 (3 float32)",
        ),
    ],
)
def test_a_rank_that_never_arrives_is_named(launch: Launch, others: str, message: str) -> None:
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
layer.fqn = "stem"
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


def test_a_rank_that_never_joins_is_an_error(launch: Launch) -> None:
    job = launch(
        "openmpi",
        2,
        """
if rank == 1:
    time.sleep(60)
join(seconds=3)
""",
    )
    assert job.finish() != 0
    assert "MPI has not started after 3 s: some ranks of the job have not come to" in job.output
    assert_gone(job, 2)


def test_a_rank_that_never_makes_the_group_is_named(launch: Launch) -> None:
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


def test_an_error_of_mpi_is_an_exception(launch: Launch) -> None:
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


@pytest.mark.parametrize("transport", MPIS)
@pytest.mark.parametrize("end", ["dist.destroy_process_group()", "", "MPI.Finalize()"])
def test_a_job_ends_with_work_under_way(launch: Launch, transport: str, end: str) -> None:
    """Messages that nobody waits for arrive, with and without a tidy end."""
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
def test_forked_children_of_a_rank_end(launch: Launch, transport: str) -> None:
    """A child that ended by sys.exit waited for the other ranks in MPI_Finalize."""
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


def test_an_mpirun_of_another_mpi_is_an_error(launch: Launch) -> None:
    job = launch(
        "mpich", 2, "join()", variables=dict.fromkeys(("MPI4PY_MPIABI", "LD_LIBRARY_PATH"))
    )
    assert job.finish() != 0
    assert "the launcher started 2 processes, but MPI sees 1" in job.output
    assert "Open MPI" in job.output


def alone(
    program: str, *, launcher: tuple[str, ...] = (), variables: Mapping[str, str] | None = None
) -> tuple[int, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI", "PMI", "SLURM"))}
    done = subprocess.run(
        [sys.executable, *launcher, *(() if launcher else ("-c", program))],
        env={**clean, "OMP_NUM_THREADS": "1", **(variables or {})},
        cwd=transports.ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    return done.returncode, done.stderr + done.stdout


def test_without_mpirun_mpi4py_is_a_group_of_one() -> None:
    status, output = alone(
        """
import torch, torch.distributed as dist, syncbn
place = syncbn.init_process_group("mpi4py")
x = torch.ones(3)
dist.all_reduce(x)
print(place.world_size, dist.get_backend(), x.tolist())
dist.destroy_process_group()
"""
    )
    assert status == 0, output
    assert "1 mpi4py [1.0, 1.0, 1.0]" in output
    assert output.count("not started by mpirun: the mpi4py process group has this process") == 1


def test_mpi4py_under_torchrun_is_an_error(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import syncbn\nsyncbn.init_process_group('mpi4py')\n")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program))
    status, output = alone("", launcher=torchrun)
    assert status != 0
    assert "ranks [0, 0] of MPI.COMM_WORLD, which must differ; start the job with mpirun" in output


@pytest.mark.parametrize(
    ("before", "variables"),
    [
        ("sys.modules['mpi4py'] = None", {}),
        ("pass", {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": ""}),
    ],
    ids=["no mpi4py", "no libmpi"],
)
def test_what_is_missing_is_named_with_its_remedy(before: str, variables: dict[str, str]) -> None:
    status, output = alone(
        f"import sys; {before}; import syncbn; syncbn.init_process_group('mpi4py')",
        variables=variables,
    )
    assert status != 0
    assert "ImportError: the backend 'mpi4py' needs mpi4py and an MPI library: pip inst" in output


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("mpi4py.rc.thread_level = 'single'; from mpi4py import MPI", "needs MPI_THREAD_MULTIPLE"),
        ("from mpi4py import MPI; MPI.Finalize()", "MPI has been finalized"),
    ],
)
def test_an_mpi_that_cannot_serve_is_an_error(before: str, message: str) -> None:
    program = f"import mpi4py; {before}; import syncbn; syncbn.init_process_group('mpi4py')"
    status, output = alone(program)
    assert status != 0
    assert message in output
