"""`syncbn-doctor`: report on installation, launcher, ranks and all-reduces, and known problems.

On a single rank, or on every rank of a job: ``launch/torchrun.sh -m syncbn.cli.doctor``, or with
mpirun.sh.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import timedelta
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
from syncbn.bench.networks import NETWORKS
from syncbn.bench.synchronization import list_messages, predict_seconds, time_all_reduces
from syncbn.calibration.display import escape_controls
from syncbn.cli import config_path
from syncbn.cli.diagnosis import describe_rank, explain_backend, find_problems
from syncbn.cli.signals import deferred_termination
from syncbn.distributed.groups import resolve_group
from syncbn.distributed.launchers import detect_launcher, find_launcher
from syncbn.distributed.objects import all_gather_objects
from syncbn.files import atomic_write, require_file
from syncbn.kernels import cpu, triton_unavailable_reason

_FAILED, _WRONG_USE = 1, 2
# Seconds of a day.
_LONGEST_TIMEOUT = 86400


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


def report(info: syncbn.RankInfo, requested: str | None = None) -> dict[str, Any]:
    """Return the whole report, the same on every rank; a collective.

    Args:
        info: this rank.
        requested: backend of the command line, or None.
    """
    ranks = all_gather_objects(describe_rank(info, os.environ))
    backend, launcher = dist.get_backend(), detect_launcher(os.environ)
    times = {"all ranks": time_all_reduces(info.device)}
    if len({rank.host for rank in ranks}) > 1:
        times["ranks of one host"] = time_all_reduces(info.device, resolve_group("node"))
    with torch.device("meta"):
        networks = {name: list_messages(make()) for name, make in NETWORKS.items()}
    return {
        "installation": {**installation(), **(mpi() if backend == "mpi4py" else {})},
        "backend": backend,
        "reason": explain_backend(requested, backend, launcher, ranks),
        "launcher": launcher,
        "ranks": [rank._asdict() for rank in ranks],
        "all_reduce_seconds": times,
        "step_seconds": {
            name: predict_seconds(messages, times["all ranks"])
            for name, messages in networks.items()
        },
        "problems": find_problems(backend, ranks),
    }


def show(report: dict[str, Any]) -> None:
    """Print a report as tables, and its problems."""
    # Not markup, which would drop the brackets of 'syncbn[cuda]'.
    console = Console(markup=False, emoji=False)
    show_installation(console, report["installation"])
    console.print(
        f"launcher: {report['launcher']}; backend: {report['backend']} ({report['reason']})",
        soft_wrap=True,
    )
    hidden = ("versions", "variables")
    columns = [name for name in report["ranks"][0] if name not in hidden]
    table = Table(*columns, title=f"{len(report['ranks'])} rank(s)", title_justify="left")
    for rank in report["ranks"]:
        table.add_row(*(escape_controls(str(rank[name])) for name in columns))
    console.print(table)
    if len(report["ranks"]) > 1:
        _show_times(console, report)
    for problem in report["problems"]:
        console.print(f"problem: {escape_controls(problem)}", soft_wrap=True)
    if not report["problems"]:
        console.print("no known problems")


def show_installation(console: Console, installation: dict[str, str]) -> None:
    """Print versions, backends and kernels."""
    table = Table(title="Installation", show_header=False, title_justify="left")
    for name, value in installation.items():
        table.add_row(name, escape_controls(value, keep="\n"))
    console.print(table)


def _show_times(console: Console, report: dict[str, Any]) -> None:
    times = report["all_reduce_seconds"]
    console.print("all-reduce of float64 values, microseconds (median, slowest rank)")
    table = Table("values", *times)
    for size in times["all ranks"]:
        table.add_row(str(size), *(f"{column[size] * 1e6:.0f}" for column in times.values()))
    console.print(table)
    steps = (f"{name} {s * 1e3:.1f} ms" for name, s in report["step_seconds"].items())
    console.print(
        "all-reduces of a training step at these times, without waits for slower ranks: "
        f"{', '.join(steps)}",
        soft_wrap=True,
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@hydra.main(version_base="1.3", config_path=config_path(), config_name="doctor")
def main(config: DictConfig) -> None:
    """Print the report on rank 0, and write it to the file of ``json=``."""
    if not isinstance(config.timeout, int | float) or not 0 < config.timeout < _LONGEST_TIMEOUT:
        expected = f"expected seconds, above 0 and below {_LONGEST_TIMEOUT}"
        sys.stderr.write(f"syncbn-doctor: timeout: got {config.timeout!r}; {expected}\n")
        sys.exit(_WRONG_USE)
    try:
        info = syncbn.init_process_group(config.backend, timedelta(seconds=config.timeout))
    except (ImportError, RuntimeError, ValueError) as error:
        launcher = find_launcher(os.environ)
        if launcher is None or os.environ.get(launcher.rank, "0") == "0":
            show_installation(Console(markup=False, emoji=False), installation())
        sys.stderr.write(f"syncbn-doctor: {error}\n")
        sys.exit(_FAILED)
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
    result = report(info, config.backend)
    if info.rank == 0:
        show(result)
        if path is not None:
            with deferred_termination(), atomic_write(path) as file:
                file.write((json.dumps(result, indent=2) + "\n").encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
