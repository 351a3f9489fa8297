"""init_process_group under torchrun, mpirun, as a single process, and with invalid variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import syncbn
from tests import processes, transports

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
PROGRAM = """
import sys, torch, torch.distributed as dist, syncbn
info = syncbn.init_process_group(*sys.argv[1:])
assert (info.rank, info.world_size) == (dist.get_rank(), dist.get_world_size())
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


def run(command: list[str], program: Path, **environment: str) -> list[str]:
    program.write_text(PROGRAM)
    clean = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    done = subprocess.run(
        [*command, str(program)],
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


def test_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    lines = run(command, tmp_path / "program.py")
    assert lines == ["0 2 0 cpu gloo 1.0", "1 2 1 cpu gloo 1.0"]


def test_torchrun_restarts_after_killed_rank(tmp_path: Path) -> None:
    """The second attempt read addresses of the first one from the agent's store."""
    program = tmp_path / "program.py"
    program.write_text(
        """
import os, signal, sys, torch, torch.distributed as dist, syncbn
from datetime import timedelta
info = syncbn.init_process_group(timeout=timedelta(seconds=15))
dist.barrier()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and info.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
layer = syncbn.SyncBatchNorm1d(2, momentum=1.0)
layer(torch.full((1, 2), 2.0 * info.rank))
sys.stdout.write(f"{info.rank} {layer.running_mean[0].item()}\\n")
dist.barrier()
dist.destroy_process_group()
"""
    )
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    done = processes.run([sys.executable, "-m", *torchrun, program], tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 1.0", "1 1.0"]


def _start_by_rank_and_world_size(program: Path, port: int) -> list[subprocess.Popen[str]]:
    clean = {name: value for name, value in os.environ.items() if "RANK" not in name}
    address = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store of the test, on a free port
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, program],
            env={**clean, **address, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_local_ranks_are_counted_without_local_rank(tmp_path: Path) -> None:
    """Kubernetes operators set RANK and WORLD_SIZE, but not LOCAL_RANK."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    jobs = _start_by_rank_and_world_size(program, store.port)
    lines = [job.communicate(timeout=50)[0].strip() for job in jobs]
    assert lines == ["0 2 0 cpu gloo 1.0", "1 2 1 cpu gloo 1.0"]


def test_single_process(tmp_path: Path) -> None:
    assert run([sys.executable], tmp_path / "program.py") == ["0 1 0 cpu gloo 0.0"]


def test_destroyed_group_leaves_no_threads() -> None:
    """Even after an import of torch.compile; remaining threads may abort at exit."""
    program = """
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
    clean = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    done = subprocess.run([sys.executable, "-c", program], env=clean, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("transport", "arguments", "backend"),
    [("openmpi", [], "mpi4py"), ("mpich", [], "mpi4py"), ("openmpi", ["gloo"], "gloo")],
)
def test_mpirun(transport: str, arguments: list[str], backend: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    (process,) = transports.start(
        transport, 2, [program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = process.communicate(timeout=50)
    assert process.returncode == 0, errors
    assert sorted(output.splitlines()) == [f"0 2 0 cpu {backend} 1.0", f"1 2 1 cpu {backend} 1.0"]


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


def test_srun_without_mpi_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(RuntimeError, match=r"SLURM_STEP_NUM_TASKS=4: .*srun --mpi=pmix"):
        syncbn.init_process_group()


def test_unknown_backend_raises() -> None:
    expected = "got backend 'ncll'; expected 'nccl', 'gloo', 'mpi4py' or None"
    with pytest.raises(ValueError, match=expected):
        syncbn.init_process_group("ncll")
