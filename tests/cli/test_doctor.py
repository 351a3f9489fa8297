"""syncbn-doctor: its report under each launcher; commands without NumPy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from syncbn.cli import doctor
from tests import processes, transports
from tests.calibration.networks import network

DOCTOR = ["-m", "syncbn.cli.doctor", "json=report.json"]
# Gloo first, then MPI. The CUDA support of an MPI is fixed, so the test replaces the query.
SINGLE_RANK = """
import json, sys
import torch.distributed as dist
import syncbn
from syncbn.cli import doctor
doctor.report(syncbn.init_process_group())
loaded = [name for name in sys.modules if name.startswith("mpi4py")]
dist.destroy_process_group()
found = doctor.report(syncbn.init_process_group("mpi4py"))
from syncbn.distributed import mpi
mpi.is_cuda_aware = lambda: True
print(json.dumps([loaded, found, doctor.mpi()]))
"""


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_unwritable_report_is_rejected_before_the_measurement(tmp_path: Path) -> None:
    """Regression: rank 0 measured, printed, and replaced a pipe by a file."""
    os.mkfifo(tmp_path / "report.json")
    done = processes.run_forked("syncbn.cli.doctor", ["json=report.json"], tmp_path)
    assert done.returncode != 0
    assert "syncbn-doctor: json: report.json: is a device, a pipe or a socket" in done.stderr
    assert done.stdout == ""
    assert (tmp_path / "report.json").is_fifo()


def test_under_mpirun(tmp_path: Path) -> None:
    (job,) = transports.start("mpich", 2, DOCTOR, cwd=tmp_path, stdout=subprocess.PIPE)
    printed, _ = job.communicate(timeout=100)
    assert job.returncode == 0
    found = report(tmp_path)
    assert (found["launcher"], found["backend"]) == ("mpirun", "mpi4py")
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert found["reason"] == "no GPUs; launcher mpirun: mpi4py connects the ranks"
    assert [*found["all_reduce_seconds"]["all ranks"]] == ["1", "130", "1026", "4098", "16386"]
    assert 0 < found["step_seconds"]["resnet20"] < found["step_seconds"]["resnet50"]
    assert "without waits for slower ranks: resnet20" in printed
    installation = found["installation"]
    assert installation["mpi4py"] == metadata.version("mpi4py")
    assert installation["MPI library"].startswith("MPICH")
    assert installation["MPI thread level"] == "multiple"
    assert "MPICH" in printed
    assert installation["CUDA tensors over MPI"] in printed


def test_single_rank(tmp_path: Path) -> None:
    """Regression: the report of another backend imported mpi4py, which starts MPI."""
    done = processes.run([sys.executable, "-c", SINGLE_RANK], tmp_path)
    assert done.returncode == 0, done.stderr
    loaded, found, cuda_aware = json.loads(done.stdout)
    assert loaded == []
    assert (found["launcher"], found["backend"]) == ("none", "mpi4py")
    memory = "CUDA tensors over MPI"
    kinds = ("device pointers (CUDA-aware)", "staged through host memory")
    assert found["installation"][memory] in kinds
    assert cuda_aware[memory] == kinds[0]


def test_control_characters_are_escaped_and_brackets_are_not_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In host names, paths and messages of compilers; the advice `pip install 'syncbn[cuda]'`."""
    rank = {"rank": 0, "host": "node\x1b[2J", "versions": "", "variables": {}}
    installation = {"C++": "a\x1b]0;title\x07 [bold]", "Triton": "'syncbn[cuda]'"}
    found = {"installation": installation, "backend": "gloo", "launcher": "none", "ranks": [rank]}
    doctor.show({**found, "reason": "requested", "problems": []})
    printed = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in printed)
    for text in (r"node\x1b[2J", r"a\x1b]0;title\x07 [bold]", "'syncbn[cuda]'"):
        assert text in printed


def test_installation_is_reported_if_the_ranks_cannot_start(tmp_path: Path) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nohost.invalid"}
    command = [sys.executable, *DOCTOR]
    done = processes.run(command, tmp_path, {**environment, "MASTER_PORT": "1"})
    assert done.returncode == 1
    assert "C++ kernels" in done.stdout
    assert done.stderr.startswith("syncbn-doctor: the host name 'nohost.invalid' (from MASTER_ADDR")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "null", "1e9"])
def test_bad_timeout_is_a_clear_error(timeout: str, tmp_path: Path) -> None:
    done = processes.run_forked("syncbn.cli.doctor", [f"timeout={timeout}"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("syncbn-doctor: timeout: got ")
    assert "Traceback" not in done.stderr


def test_missing_mpi4py_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    assert "mpi4py" in doctor.installation()["torch.distributed backends"]
    assert doctor.installation()["Triton kernels"] == f"Triton {metadata.version('triton')}"
    monkeypatch.setattr(metadata, "version", version)
    found = doctor.installation()
    assert found["mpi4py"] == "not installed"
    assert "mpi4py" not in found["torch.distributed backends"]


# Expected in the layer: the mean of all samples in one process, in float64.
WITHOUT_NUMPY = """
import sys, torch, syncbn
import torch.distributed as dist
from syncbn.cli import doctor, recalibrate
from torch.nn.parallel import DistributedDataParallel
info = syncbn.init_process_group("gloo")
torch.manual_seed(0)
everyone = torch.randn(6, 3, 4, 4)
layer = syncbn.SyncBatchNorm2d(3, process_group="node", momentum=1.0)
model = DistributedDataParallel(layer)
model(everyone[info.rank :: info.world_size]).square().sum().backward()
torch.testing.assert_close(layer.running_mean, everyone.double().mean((0, 2, 3)).float())
assert bool(layer.weight.grad.isfinite().all())
try:
    torch.zeros(1).numpy()
except RuntimeError as error:
    print(f"{error}")
dist.destroy_process_group()
sys.argv = ["doctor", "json=report.json"]
doctor.main()
sys.argv = [
    "recalibrate", "checkpoint=in.pt", "output=out.pt", "evaluate=true",
    "+model._target_=tests.calibration.networks.network",
    "+data._target_=tests.calibration.networks.labelled", "+data.batch_size=5",
    "+data.rank=${rank}", "+data.world_size=${world_size}",
]
recalibrate.main()
"""


def test_layers_and_commands_without_numpy(tmp_path: Path) -> None:
    """NumPy is no dependency; without it all ranks of a command ended with a traceback."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "numpy.py").write_text("raise ModuleNotFoundError('there is no NumPy')")
    (tmp_path / "program.py").write_text(WITHOUT_NUMPY)
    torch.save(network().state_dict(), tmp_path / "in.pt")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "program.py"]
    environment = {"PYTHONPATH": f"{modules}:{transports.ROOT}"}
    done = processes.run([sys.executable, *torchrun], tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Numpy is not available") == 2
    found = report(tmp_path)
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert (found["launcher"], found["backend"]) == ("torchrun", "gloo")
    assert "MPI library" not in found["installation"]
    for text in ("recalibration changes", "cross-entropy", "written: out.pt"):
        assert text in done.stdout
