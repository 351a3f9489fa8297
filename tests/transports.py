"""Start of a test's ranks: torch's backends, and mpi4py under each MPI."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
#: Transports of every distributed test. Tests of the layer use the first of each backend.
TRANSPORTS = ("gloo", "openmpi", "mpich", *(["nccl"] if torch.cuda.device_count() >= 2 else []))
#: Transports of the conformance suite. NCCL needs three GPUs, where its gaps are still unknown.
SUITE = tuple(name for name in TRANSPORTS if name != "nccl")
MPIS = ("openmpi", "mpich")


def backend_of(transport: str) -> str:
    """Return the backend name for init_process_group."""
    return "mpi4py" if transport in MPIS else transport


def start(
    transport: str,
    size: int,
    program: Sequence[str | Path],
    *,
    outlives_ranks: bool = False,
    variables: Mapping[str, str | None] | None = None,
    **options: Any,
) -> list[subprocess.Popen[str]]:
    """Start ``python PROGRAM`` on every rank, with one thread per rank.

    Without mpirun, only RANK and WORLD_SIZE identify the ranks.

    Args:
        transport: one of TRANSPORTS.
        size: number of ranks.
        program: a file, or ``-m`` and a module, then arguments.
        outlives_ranks: True if mpirun keeps the other ranks running after one ends.
        variables: additional environment variables; None removes a variable.
        options: arguments of Popen.
    """
    inherited = {k: v for k, v in os.environ.items() if not _is_launcher_variable(k)}
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    merged = {**inherited, **own, **environment_of(transport), **(variables or {})}
    environment = {name: value for name, value in merged.items() if value is not None}
    command = [sys.executable, *map(str, program)]
    ranks = [{"RANK": str(rank), "WORLD_SIZE": str(size)} for rank in range(size)]
    if backend_of(transport) == "mpi4py":
        command, ranks = [*mpirun(transport, size, outlives_ranks), *command], [{}]
    options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "text": True, **options}
    return [subprocess.Popen(command, env={**environment, **rank}, **options) for rank in ranks]


def mpirun(transport: str, size: int, outlives_ranks: bool = False) -> list[str]:
    """Return the mpirun command line before the program."""
    if transport == "mpich":
        option = ["-disable-auto-cleanup"] if outlives_ranks else []
        return [str(_mpich() / "bin" / "mpirun"), *option, "-n", str(size)]
    lenient = ["--runtime-options", "recoverable,continuous,error-nonzero-status=0"]
    option = lenient if outlives_ranks else []
    found = Path(sys.executable).parent / "mpirun"
    assert found.exists(), f"{found} is missing: pip install -e '.[dev]'"
    return [str(found), "--allow-run-as-root", "--oversubscribe", *option, "-n", str(size)]


def environment_of(transport: str) -> Mapping[str, str]:
    """Return the variables that make mpi4py load the library of a transport."""
    if transport != "mpich":
        return {}
    return {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(_mpich() / "lib")}


@cache
def _mpich() -> Path:
    # In a separate folder, since its mpirun would replace Open MPI's.
    folder = ROOT / ".pytest_cache" / "mpich"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        # A second test process waits until the installation is complete.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "bin" / "mpirun").exists():
            subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "install", "--quiet", "--ignore-installed"),
                    *("--prefix", str(folder), "-c", str(ROOT / "constraints.txt"), "mpich"),
                ],
                check=True,
            )
    return folder


def _is_launcher_variable(name: str) -> bool:
    prefixes = ("OMPI_", "PMI", "SLURM_", "TORCHELASTIC_", "MASTER_", "LOCAL_")
    return name in ("RANK", "WORLD_SIZE", "GROUP_RANK") or name.startswith(prefixes)
