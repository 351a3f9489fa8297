"""`syncbn-doctor`: what this machine, this launcher and this installation give the layer.

Alone, or on every rank of a job: ``launch/torchrun.sh -m syncbn.cli.doctor``, or with mpirun.sh.
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
from syncbn.calibration.printable import escape_controls
from syncbn.cli import config_path
from syncbn.cli.signals import deferred_termination
from syncbn.distributed.launchers import detect_launcher
from syncbn.distributed.objects import all_gather_objects
from syncbn.files import replacing, require_file
from syncbn.kernels import cpu, missing_triton

# Numbers in the message of a layer with 512 channels.
_MESSAGE = 1025
_REPEATS = 30
_WRONG_USE = 2


def installation() -> dict[str, str]:
    """Return versions, and the kernels that layers take."""
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
        "Triton kernels": missing_triton() or f"Triton {_version('triton')}",
        "mpi4py": _version("mpi4py") or "not installed",
    }


def mpi() -> dict[str, str]:
    """Return what MPI can do, once it has been started."""
    from syncbn.distributed.mpi import MPI, VERSION, is_cuda_aware

    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    reads = is_cuda_aware()
    return {
        "MPI library": VERSION,
        "MPI thread level": levels[MPI.Query_thread()],
        "CUDA tensors over MPI": (
            "device pointers (CUDA-aware)" if reads else "staged through host memory"
        ),
    }


def rank_report(place: syncbn.RankInfo) -> dict[str, Any]:
    """Return where this rank runs and how its all-reduce behaves; every rank must call this."""
    return {
        "rank": place.rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": str(place.device),
        "threads": torch.get_num_threads(),
        "all_reduce_us": _all_reduce_microseconds(place.device),
    }


def report(place: syncbn.RankInfo) -> dict[str, Any]:
    """Return the whole report, the same on every rank."""
    ranks = all_gather_objects(rank_report(place))
    backend = dist.get_backend()
    return {
        "installation": {**installation(), **(mpi() if backend == "mpi4py" else {})},
        "backend": backend,
        "launcher": detect_launcher(os.environ),
        "ranks": ranks,
    }


def show(found: dict[str, Any]) -> None:
    """Print a report as two tables."""
    # Not markup: it would drop the brackets of 'syncbn[cuda]'.
    console = Console(markup=False, emoji=False)
    table = Table(title="Installation", show_header=False, title_justify="left")
    for name, value in found["installation"].items():
        table.add_row(name, escape_controls(value, keep="\n"))
    console.print(table)
    title = f"{len(found['ranks'])} rank(s), backend {found['backend']}"
    table = Table(title=f"{title}, launcher: {found['launcher']}", title_justify="left")
    for name in found["ranks"][0]:
        table.add_column(name.replace("_", " "), justify="right")
    for rank in found["ranks"]:
        cells = (f"{v:.0f}" if isinstance(v, float) else str(v) for v in rank.values())
        table.add_row(*map(escape_controls, cells))
    console.print(table)
    console.print(
        f"all reduce us: median of {_REPEATS} sums of {_MESSAGE} float64 numbers, the message of a "
        "layer with 512 channels"
    )


def _all_reduce_microseconds(device: torch.device) -> float:
    vector = torch.ones(_MESSAGE, dtype=torch.float64, device=device)
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
    """Print the report on rank 0; write it where ``json=`` says."""
    place = syncbn.init_process_group(config.backend)
    path = None if config.json is None else Path(config.json)
    refusal = _refusal(path) if place.rank == 0 else None
    if any(all_gather_objects(refusal)):
        dist.destroy_process_group()
        if refusal is not None:
            sys.stderr.write(f"syncbn-doctor: {refusal}\n")
        sys.exit(_WRONG_USE)
    found = report(place)
    if place.rank == 0:
        show(found)
        if path is not None:
            with deferred_termination(), replacing(path) as file:
                file.write((json.dumps(found, indent=2) + "\n").encode())
    dist.destroy_process_group()


def _refusal(path: Path | None) -> str | None:
    """Return the reason why a file cannot be written, for all ranks to stop."""
    try:
        if path is not None:
            require_file(path)
    except ValueError as error:
        return f"json: {error}"
    return None


if __name__ == "__main__":
    main()
