"""init_process_group under torchrun, mpirun, as a single process, and with invalid variables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import syncbn
from syncbn.distributed import initialization
from tests import processes, transports
from tests.ranks import Ranks

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
PROGRAM = """
import os, signal, sys, torch, torch.distributed as dist, syncbn
info = syncbn.init_process_group(*sys.argv[1:])
assert (info.rank, info.world_size) == (dist.get_rank(), dist.get_world_size())
if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    dist.barrier()
    if info.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
x = torch.full((1, 2, 1, 1), 2.0 * info.rank)
layer = syncbn.SyncBatchNorm2d(2, momentum=1.0)
if info.world_size > 1:
    layer(x)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
model(torch.randn(3, 2)).sum().backward()
line = f"{info.rank} {info.world_size} {info.local_rank} {info.device} {dist.get_backend()}"
# In one write, because the ranks share the pipe.
sys.stdout.write(f"{line} {layer.running_mean[0].item()}\\n")
# Gloo may abort a process that exits during the all-reduce of DDP's last bucket.
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def _expected(backend: str) -> list[str]:
    return [f"{rank} 2 {rank} cpu {backend} 1.0" for rank in range(2)]


def test_torchrun_restarts_after_killed_rank(program: Path) -> None:
    """The second attempt read addresses of the first one from the agent's store."""
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    done = processes.run([sys.executable, "-m", *torchrun, program], program.parent)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == _expected("gloo")


def _run_ranks(transport: str, program: Path, **variables: str) -> list[str]:
    jobs = transports.start(transport, 2, [program], stdout=subprocess.PIPE, variables=variables)
    output = "".join(job.communicate(timeout=100)[0] for job in jobs)
    assert [job.returncode for job in jobs] == [0] * len(jobs)
    return sorted(output.splitlines())


def test_local_ranks_are_counted_without_local_rank(program: Path) -> None:
    """Kubernetes operators set RANK and WORLD_SIZE, but not LOCAL_RANK."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store of the test, on a free port
    }
    assert _run_ranks("gloo", program, **address) == _expected("gloo")


def test_mpirun(program: Path) -> None:
    assert _run_ranks("mpich", program) == _expected("mpi4py")


def test_single_process(program: Path) -> None:
    """A destroyed group leaves no threads, which may abort at exit; even after torch.compile."""
    check = """
import os, syncbn, torch.distributed as dist
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
syncbn.init_process_group()
dist.barrier()
import torch._dynamo
assert threads() > before
dist.destroy_process_group()
assert threads() == before
"""
    done = processes.run([sys.executable, "-c", check + PROGRAM], program.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 1 0 cpu gloo 0.0\n"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("missing", sorted(set(TORCHRUN) - {"LOCAL_RANK"}))
def test_missing_variables_are_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name, value in TORCHRUN.items():
        if name != missing:
            monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"but not {missing}; start with torchrun"):
        syncbn.init_process_group()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "two", "got RANK='two'; expected a non-negative integer"),
        ("RANK", "2", "got RANK=2 with WORLD_SIZE=2; expected a rank from 0 to 1"),
        ("WORLD_SIZE", "-1", "got WORLD_SIZE='-1'"),
        ("MASTER_PORT", "abc", "got MASTER_PORT='abc'"),
        ("LOCAL_WORLD_SIZE", "", "got LOCAL_WORLD_SIZE=''"),
    ],
)
def test_invalid_variables_raise(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    for variable, text in {**TORCHRUN, name: value}.items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=message):
        syncbn.init_process_group()


SRUN = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "node7",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
}


def test_plain_srun(program: Path) -> None:
    """The variables of SLURM 22.05, which sets up no MPI by default."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {**SRUN, "MASTER_PORT": port, "RANK": None, "WORLD_SIZE": None}
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    jobs = [
        subprocess.Popen(
            [sys.executable, program],
            env={k: v for k, v in {**os.environ, **variables, **rank}.items() if v is not None},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    output = "".join(job.communicate(timeout=100)[0] for job in jobs)
    assert sorted(output.splitlines()) == _expected("gloo")


def test_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {**SRUN, "SLURM_PROCID": "0", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        message = f"store of rank 0 at localhost:{port} .*: port {port} is in use .*set MASTER_PORT"
        with pytest.raises(RuntimeError, match=message):
            syncbn.init_process_group()


@pytest.mark.parametrize("rank", [0, 1])
def test_unknown_host_is_named(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in {**TORCHRUN, "RANK": str(rank), "MASTER_ADDR": "nohost.invalid"}.items():
        monkeypatch.setenv(name, value)
    message = r"'nohost.invalid' \(from MASTER_ADDR and MASTER_PORT\) does not resolve on .*; set M"
    with pytest.raises(RuntimeError, match=message):
        syncbn.init_process_group()


def _take_over(rank: int) -> list[object]:
    info = syncbn.init_process_group()
    try:
        syncbn.init_process_group("nccl")
    except ValueError as error:
        return [info.rank, info.world_size, info.local_rank, str(error)]
    return []


def test_group_of_others_is_taken_over(two_ranks: Ranks) -> None:
    for rank, answer in enumerate(two_ranks.run(_take_over)):
        assert answer[:3] == [rank, 2, rank]
        assert "got backend 'nccl', but torch.distributed is initialized with" in str(answer[3])


@pytest.mark.parametrize(
    ("bound", "current", "expected"), [(None, 0, 2), (None, 3, 3), (torch.device("cuda:1"), 0, 1)]
)
def test_device_of_a_group_of_others(
    monkeypatch: pytest.MonkeyPatch, bound: torch.device | None, current: int, expected: int
) -> None:
    """Regression: every rank got cuda:0 if no rank had set a device. The GPUs are not here."""
    selected: list[int] = []
    for name, value in {
        "device_count": lambda: 4,
        "current_device": lambda: current,
        "set_device": selected.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    group: Any = SimpleNamespace(bound_device_id=bound)
    assert initialization._device_of(group, local_rank=2) == torch.device("cuda", expected)
    assert selected == [expected]


def test_unknown_backend_raises() -> None:
    expected = "got backend 'ncll'; expected 'nccl', 'gloo', 'mpi4py' or None"
    with pytest.raises(ValueError, match=expected):
        syncbn.init_process_group("ncll")
