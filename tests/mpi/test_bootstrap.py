"""Initialization of the mpi4py backend: launchers, missing ranks, unusable MPI libraries."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.mpi_jobs import Launch, assert_gone
from tests.processes import run
from tests.ranks import Pool


def test_rank_that_never_joins_is_error(launch: Launch) -> None:
    job = launch("openmpi", 2, "if rank == 1: time.sleep(60)\njoin(seconds=1)")
    assert job.finish() != 0
    assert "MPI is not initialized after 1 s: some ranks of the job have not called" in job.output
    assert_gone(job, 2)


def _miss_rank_1(rank: int) -> str:
    from syncbn.distributed.mpi.rendezvous import local_peer, rendezvous

    store: Any = dist.HashStore()
    store.set("value/2", "")
    with pytest.raises(RuntimeError) as caught:
        rendezvous(store, 0, 3, 0.1, local_peer())
    return str(caught.value)


def test_rank_absent_from_rendezvous_is_named(pool: Pool) -> None:
    for message in pool(3, "openmpi").run(_miss_rank_1):
        assert "waited 0.1 s for ranks [1] to create an MPI process group" in message


def test_mpirun_of_another_mpi_is_error(launch: Launch) -> None:
    job = launch(
        "mpich", 2, "join()", variables=dict.fromkeys(("MPI4PY_MPIABI", "LD_LIBRARY_PATH"))
    )
    assert job.finish() != 0
    assert "mpirun started 2 processes, but MPI has 1" in job.output
    assert "Open MPI" in job.output


INIT = "import syncbn; syncbn.init_process_group('mpi4py')"


def test_single_process_without_mpirun(tmp_path: Path) -> None:
    program = f"""
import sys, torch, torch.distributed as dist
sys.modules["mpi4py"] = None
try:
    {INIT}
except ImportError as error:
    print("without mpi4py:", error)
del sys.modules["mpi4py"]
{INIT}
x = torch.ones(3)
dist.all_reduce(x)
print(dist.get_world_size(), dist.get_backend(), x.tolist())
dist.destroy_process_group()
"""
    done = run([sys.executable, "-c", program], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "without mpi4py: the backend 'mpi4py' needs mpi4py and an MPI library: " in done.stdout
    assert "1 mpi4py [1.0, 1.0, 1.0]" in done.stdout
    warning = "not started by mpirun: the mpi4py process group has a single rank"
    assert done.stderr.count(warning) == 1


def test_mpi4py_under_torchrun_is_error(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(INIT)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "program.py")
    done = run([sys.executable, *torchrun], tmp_path)
    assert done.returncode != 0
    expected = "ranks [0, 0] of MPI.COMM_WORLD, which must differ; start the job with mpirun"
    assert expected in done.stderr


def test_missing_library_is_named_with_remedy(tmp_path: Path) -> None:
    variables = {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": ""}
    done = run([sys.executable, "-c", INIT], tmp_path, variables)
    assert done.returncode != 0
    expected = "ImportError: the backend 'mpi4py' needs mpi4py and an MPI library: pip inst"
    assert expected in done.stderr


def test_unusable_mpi_is_error(tmp_path: Path) -> None:
    program = f"""
import mpi4py
mpi4py.rc.thread_level = "single"
from mpi4py import MPI
try:
    {INIT}
except RuntimeError as error:
    print(error)
MPI.Finalize()
syncbn.init_process_group("mpi4py")
"""
    done = run([sys.executable, "-c", program], tmp_path)
    assert done.returncode != 0
    assert "needs MPI_THREAD_MULTIPLE" in done.stdout
    assert "MPI has been finalized" in done.stderr
