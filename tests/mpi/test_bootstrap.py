"""Initialization of the mpi4py backend: launchers, missing ranks, unusable MPI libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import transports
from tests.mpi_jobs import Launch, assert_gone


def test_rank_that_never_joins_is_error(launch: Launch) -> None:
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
    assert "MPI is not initialized after 3 s: some ranks of the job have not called" in job.output
    assert_gone(job, 2)


def test_mpirun_of_another_mpi_is_error(launch: Launch) -> None:
    job = launch(
        "mpich", 2, "join()", variables=dict.fromkeys(("MPI4PY_MPIABI", "LD_LIBRARY_PATH"))
    )
    assert job.finish() != 0
    assert "the launcher started 2 processes, but MPI has 1" in job.output
    assert "Open MPI" in job.output


def run_process(
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


def test_single_process_without_mpirun() -> None:
    status, output = run_process(
        """
import torch, torch.distributed as dist, syncbn
info = syncbn.init_process_group("mpi4py")
x = torch.ones(3)
dist.all_reduce(x)
print(info.world_size, dist.get_backend(), x.tolist())
dist.destroy_process_group()
"""
    )
    assert status == 0, output
    assert "1 mpi4py [1.0, 1.0, 1.0]" in output
    assert output.count("not started by mpirun: the mpi4py process group has a single rank") == 1


def test_mpi4py_under_torchrun_is_error(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import syncbn\nsyncbn.init_process_group('mpi4py')\n")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program))
    status, output = run_process("", launcher=torchrun)
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
def test_missing_library_is_named_with_remedy(before: str, variables: dict[str, str]) -> None:
    status, output = run_process(
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
def test_unusable_mpi_is_error(before: str, message: str) -> None:
    program = f"import mpi4py; {before}; import syncbn; syncbn.init_process_group('mpi4py')"
    status, output = run_process(program)
    assert status != 0
    assert message in output
