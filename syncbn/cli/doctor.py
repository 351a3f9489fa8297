"""`syncbn-doctor`: report on this machine, launcher and installation.

On a single rank, or on every rank of a job: ``launch/torchrun.sh -m syncbn.cli.doctor``, or with
mpirun.sh.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

import syncbn
from syncbn.calibration.display import escape_controls
from syncbn.cli import config_path
from syncbn.cli.signals import deferred_termination
from syncbn.distributed.launchers import detect_launcher
from syncbn.distributed.objects import all_gather_objects
from syncbn.files import atomic_write, require_file
from syncbn.kernels import cpu, triton_unavailable_reason

# Float64 values in the all-reduce of a layer with 512 channels.
_NUMEL = 1025
_REPEATS = 30
_WRONG_USE = 2


def installation() -> dict[str, str]:
    """Return versions, available backends and available kernels."""
    backends = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
        "mpi4py": _version("mpi4py") is not None,
    }
    return {
        "syncbn": syncbn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "GPUs": str(torch.cuda.device_count()),
        "torch.distributed backends": ", ".join(name for name, has in backends.items() if has),
        "C++ kernels": cpu.describe(),
        "Triton kernels": triton_unavailable_reason() or f"Triton {_version('triton')}",
        "mpi4py": _version("mpi4py") or "not installed",
    }


def mpi() -> dict[str, str]:
    """Return library, thread level and CUDA support of MPI; starts MPI."""
    from syncbn.distributed.mpi import MPI, VERSION, is_cuda_aware

    levels = ("single", "funneled", "serialized", "multiple")
    numbers = {getattr(MPI, f"THREAD_{level.upper()}"): level for level in levels}
    memory = "device pointers (CUDA-aware)" if is_cuda_aware() else "staged through host memory"
    return {
        "MPI library": VERSION,
        "MPI thread level": numbers[MPI.Query_thread()],
        "CUDA tensors over MPI": memory,
    }


def report(info: syncbn.RankInfo) -> dict[str, Any]:
    """Return the whole report, the same on every rank."""
    rank = {
        "rank": info.rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": str(info.device),
        "threads": torch.get_num_threads(),
        "all_reduce_us": _all_reduce_microseconds(info.device),
    }
    ranks = all_gather_objects(rank)
    backend = dist.get_backend()
    return {
        "installation": {**installation(), **(mpi() if backend == "mpi4py" else {})},
        "backend": backend,
        "launcher": detect_launcher(os.environ),
        "ranks": ranks,
    }


def show(report: dict[str, Any]) -> None:
    """Print a report as two tables."""
    # Not markup, which would drop the brackets of 'syncbn[cuda]'.
    console = Console(markup=False, emoji=False)
    table = Table(title="Installation", show_header=False, title_justify="left")
    for name, value in report["installation"].items():
        table.add_row(name, escape_controls(value, keep="\n"))
    console.print(table)
    title = f"{len(report['ranks'])} rank(s), backend {report['backend']}"
    table = Table(title=f"{title}, launcher: {report['launcher']}", title_justify="left")
    for name in report["ranks"][0]:
        table.add_column(name.replace("_", " "), justify="right")
    for rank in report["ranks"]:
        cells = (f"{v:.0f}" if isinstance(v, float) else str(v) for v in rank.values())
        table.add_row(*map(escape_controls, cells))
    console.print(table)
    console.print(
        f"all reduce us: median of {_REPEATS} all-reduces of {_NUMEL} float64 values, as for a "
        "layer with 512 channels"
    )


def _all_reduce_microseconds(device: torch.device) -> float:
    vector = torch.ones(_NUMEL, dtype=torch.float64, device=device)
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        dist.all_reduce(vector)
        vector[0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return sorted(times)[_REPEATS // 2] * 1e6


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@hydra.main(version_base="1.3", config_path=config_path(), config_name="doctor")
def main(config: DictConfig) -> None:
    """Print the report on rank 0, and write it to the file of ``json=``."""
    info = syncbn.init_process_group(config.backend)
    path = None if config.json is None else Path(config.json)
    is_wrong = False
    try:
        if path is not None and info.rank == 0:
            require_file(path)
    except ValueError as error:
        is_wrong = True
        sys.stderr.write(f"syncbn-doctor: json: {error}\n")
    if any(all_gather_objects(is_wrong)):
        dist.destroy_process_group()
        sys.exit(_WRONG_USE)
    result = report(info)
    if info.rank == 0:
        show(result)
        if path is not None:
            with deferred_termination(), atomic_write(path) as file:
                file.write((json.dumps(result, indent=2) + "\n").encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
