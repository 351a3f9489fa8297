"""syncbn-doctor: its report under each launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from syncbn.cli import doctor
from tests import processes, transports

DOCTOR = ["-m", "syncbn.cli.doctor", "json=report.json"]
# The CUDA support of MPI is fixed, so the test replaces the query.
CUDA_AWARE = """
import syncbn
from syncbn.cli import doctor
from syncbn.distributed import mpi
syncbn.init_process_group("mpi4py")
mpi.is_cuda_aware = lambda: True
print(doctor.mpi()["CUDA tensors over MPI"])
"""
QUIET = """
import sys
import syncbn
from syncbn.cli import doctor
doctor.report(syncbn.init_process_group())
print([name for name in sys.modules if name.startswith("mpi4py")])
"""


def output(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_under_torchrun(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    output(sys.executable, *torchrun, *DOCTOR, cwd=tmp_path)
    found = report(tmp_path)
    assert (found["launcher"], found["backend"]) == ("torchrun", "gloo")
    assert "MPI library" not in found["installation"]


@pytest.mark.parametrize(("mpi", "library"), [("openmpi", "Open MPI v"), ("mpich", "MPICH")])
def test_under_mpirun(mpi: str, library: str, tmp_path: Path) -> None:
    (job,) = transports.start(mpi, 2, DOCTOR, cwd=tmp_path, stdout=subprocess.PIPE)
    printed, _ = job.communicate(timeout=50)
    assert job.returncode == 0
    found = report(tmp_path)
    assert (found["launcher"], found["backend"]) == ("mpirun", "mpi4py")
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    installation = found["installation"]
    assert installation["mpi4py"] == metadata.version("mpi4py")
    assert installation["MPI library"].startswith(library)
    assert installation["MPI thread level"] == "multiple"
    assert library in printed
    assert installation["CUDA tensors over MPI"] in printed


def test_unwritable_report_is_rejected_before_the_measurement(tmp_path: Path) -> None:
    """Regression: rank 0 measured, printed, and replaced a pipe by a file."""
    os.mkfifo(tmp_path / "report.json")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = processes.run([sys.executable, *torchrun, *DOCTOR], tmp_path)
    assert done.returncode != 0
    assert "syncbn-doctor: json: report.json: is a device, a pipe or a socket" in done.stderr
    assert done.stdout == ""
    assert (tmp_path / "report.json").is_fifo()


def test_mpi_on_a_single_rank(tmp_path: Path) -> None:
    output(sys.executable, *DOCTOR, "backend=mpi4py", cwd=tmp_path)
    found = report(tmp_path)
    assert (found["launcher"], found["backend"]) == ("none", "mpi4py")
    memory = found["installation"]["CUDA tensors over MPI"]
    assert memory in ("device pointers (CUDA-aware)", "staged through host memory")


def test_cuda_aware_mpi(tmp_path: Path) -> None:
    printed = output(sys.executable, "-c", CUDA_AWARE, cwd=tmp_path)
    assert printed == "device pointers (CUDA-aware)\n"


def test_mpi_is_not_loaded_for_other_backends(tmp_path: Path) -> None:
    assert output(sys.executable, "-c", QUIET, cwd=tmp_path) == "[]\n"


def test_brackets_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: the advice was to install 'syncbn', not 'syncbn[cuda]'."""
    found = {"backend": "gloo", "launcher": "none", "ranks": [{"rank": 0}]}
    doctor.show({**found, "installation": {"Triton kernels": "pip install 'syncbn[cuda]'"}})
    assert "pip install 'syncbn[cuda]'" in capsys.readouterr().out


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """In host names, paths and messages of compilers."""
    rank = {"rank": 0, "host": "node\x1b[2J", "all_reduce_us": 3.0}
    found = {
        "installation": {"C++": "a\x1b]0;title\x07 [bold]"},
        "backend": "gloo",
        "launcher": "none",
    }
    doctor.show({**found, "ranks": [rank]})
    printed = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in printed)
    assert r"node\x1b[2J" in printed
    assert r"a\x1b]0;title\x07 [bold]" in printed


def test_missing_mpi4py_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    assert "mpi4py" in doctor.installation()["torch.distributed backends"]
    assert doctor.installation()["Triton kernels"] == f"Triton {metadata.version('triton')}"
    monkeypatch.setattr(metadata, "version", version)
    found = doctor.installation()
    assert found["mpi4py"] == "not installed"
    assert "mpi4py" not in found["torch.distributed backends"]
