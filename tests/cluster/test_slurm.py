"""Jobs of a real SLURM: plain srun, PMIx, and the batch scripts of launch/."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import STEPS, losses
from tests.cluster.slurm import SlurmCluster, missing_requirement
from tests.example.support import PROGRAM, composed, entries, fit_rank
from tests.ranks import Pool
from tests.transports import ROOT

pytestmark = pytest.mark.timeout(240)
RANK = """
import sys, syncbn, torch
info = syncbn.init_process_group(*sys.argv[1:])
layer = syncbn.SyncBatchNorm1d(1, momentum=1.0)
layer(torch.full((1, 1), float(info.rank)))
backend = torch.distributed.get_backend()
line = f"{info.rank} of {info.world_size}, {info.local_rank}, {backend}: {layer.running_mean[0]}"
sys.stdout.write(f"{line}\\n")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := missing_requirement():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    cluster = SlurmCluster(folder)
    # Both nodes are this host, and their names do not resolve.
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    cluster.environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PATH": path}
    cluster.environment |= {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    yield cluster
    cluster.close()


@pytest.mark.parametrize(
    ("options", "arguments", "local_ranks", "backend"),
    [
        ("-N2 -n4", [], "0120", "gloo"),
        # Gloo needs no MPI that speaks PMI-2.
        ("-N2 -n4 --ntasks-per-node=2 --mpi=pmi2 -mcyclic", ["gloo"], "0011", "gloo"),
        ("-N1 -n2 --mpi=pmix", [], "01", "mpi4py"),
    ],
)
def test_srun(
    cluster: SlurmCluster,
    options: str,
    arguments: list[str],
    local_ranks: str,
    backend: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    program = [sys.executable, str(tmp_path / "rank.py"), *arguments]
    environment = ["env", "PMIX_SECURITY_MODE=native"]
    output = cluster.run("srun", *options.split(), *environment, *program, timeout=200)
    size = len(local_ranks)
    expected = [
        f"{rank} of {size}, {local_rank}, {backend}: {(size - 1) / 2}"
        for rank, local_rank in enumerate(local_ranks)
    ]
    lines = [line for line in output.splitlines() if " of " in line]
    assert sorted(lines) == expected, output


def test_mpi_of_another_srun_plugin_is_named(cluster: SlurmCluster) -> None:
    program = "import syncbn; syncbn.init_process_group()"
    output = cluster.run("srun", "-n2", "--mpi=pmi2", sys.executable, "-c", program, timeout=200)
    assert "srun with PMI started 2 processes, but MPI has 1" in output
    assert "srun --mpi=pmix serves Open MPI, and --mpi=pmi2 MPICH" in output


def submit(cluster: SlurmCluster, script: str, folder: Path, steps: int, *options: str) -> str:
    """Submit a batch script of launch/ with the example; return the job's id."""
    run = ["resume=auto", f"max_steps={steps}", f"run_dir={folder / 'run'}"]
    program = [str(PROGRAM), *STEPS, *run]
    place = [f"--chdir={ROOT}", f"--output={folder / 'output'}"]
    command = ["sbatch", "--parsable", *options, *place, str(ROOT / "launch" / script), *program]
    printed = cluster.run(*command)
    assert re.fullmatch(r"\d+", printed.strip()), printed
    return printed.strip()


def wait_until(cluster: SlurmCluster, job: str, state: str, folder: Path) -> None:
    deadline = time.monotonic() + 200
    while (
        found := cluster.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()
    ) != state:
        output = (folder / "output").read_text() if (folder / "output").exists() else ""
        assert time.monotonic() < deadline, f"{found}: {output}"
        assert found in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), f"{found}: {output}"
        time.sleep(0.2)


def test_batch_script_trains_as_one_host(
    cluster: SlurmCluster, one_host: list[float], tmp_path: Path
) -> None:
    """Bit for bit, in float64."""
    cluster.environment["NPROC"] = "2"
    job = submit(cluster, "slurm_torchrun.sbatch", tmp_path, 20)
    wait_until(cluster, job, "COMPLETED", tmp_path)
    assert losses(tmp_path / "run") == one_host


def test_job_near_its_time_limit_saves_and_is_requeued(
    cluster: SlurmCluster, pool: Pool, tmp_path: Path
) -> None:
    """SIGUSR1 to the batch script alone, as --signal=B:USR1@120 sends it."""
    whole = tmp_path / "whole"
    pool(2, "gloo").run(fit_rank, composed(*STEPS, "max_steps=40", f"run_dir={whole}"))
    cluster.environment["MPI_TYPE"] = "none"
    job = submit(cluster, "slurm_mpi.sbatch", tmp_path, 40, "--ntasks-per-node=1")
    run, deadline = tmp_path / "run", time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(entries(run, "step")) < 3:
        assert time.monotonic() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.02)
    cluster.run("scancel", "--batch", "--signal=USR1", job, check=True)
    wait_until(cluster, job, "PENDING", tmp_path)
    assert 3 <= len(losses(run)) < 40
    # SLURM would wait for two minutes, but for two seconds the old credential is revoked.
    time.sleep(2)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=True)
    wait_until(cluster, job, "COMPLETED", tmp_path)
    # DDP fills its first bucket in another order after a resume.
    assert losses(run) == pytest.approx(losses(whole), rel=1e-12)


def test_cancelled_job_ends_with_all_ranks(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text(RANK + "import time; time.sleep(100)")
    program = ["srun", "-N2", "-n4", sys.executable, str(tmp_path / "sleep.py")]
    options = ["--parsable", "-N2", "-n4", f"--output={tmp_path / 'output'}"]
    job = cluster.run("sbatch", *options, f"--wrap={' '.join(program)}", check=True).strip()
    output, deadline = tmp_path / "output", time.monotonic() + 100
    while not output.exists() or output.read_text().count(" of 4") < 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cluster.run("scancel", job, check=True)
    wait_until(cluster, job, "CANCELLED", tmp_path)
    pattern = ["pgrep", "--full", str(tmp_path / "sleep.py")]
    deadline = time.monotonic() + 20
    while subprocess.run(pattern, capture_output=True).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.1)
