"""Initialization of torch.distributed from the launcher's environment."""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from syncbn.distributed import launchers
from syncbn.distributed.groups import create_layers_group
from syncbn.distributed.launchers import LaunchedProcess

_BACKENDS = ("nccl", "gloo", "mpi4py")


@dataclass(frozen=True)
class RankInfo:
    """Rank and device of this process.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: number of processes in the job.
        local_rank: index of this process on its machine.
        device: device for this rank's tensors.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def init_process_group(backend: str | None = None, timeout: timedelta | None = None) -> RankInfo:
    """Initialize torch.distributed for the launcher that started this process.

    Reads the environment of torchrun, then of mpirun or of srun with PMI. Without a launcher, the
    world size is 1, so the same program (DDP included) also runs as a single process. On CUDA, the
    current device is set. Without LOCAL_RANK, local ranks are counted by host name.

    Over Gloo and mpi4py, layers with ``process_group=None`` get a second group of all ranks,
    separate from the gradient buckets of DistributedDataParallel. It is destroyed with the default
    group.

    Args:
        backend: "nccl", "gloo", "mpi4py" or None. The default is NCCL if every local rank has a
            GPU; otherwise mpi4py in a job started by mpirun or srun, and Gloo in all other jobs.
        timeout: timeout of a collective; None for torch's default.

    Returns:
        Rank, world size, local rank and device.

    Raises:
        ImportError: mpi4py or an MPI library is needed and missing.
        ValueError: an unknown backend, a variable that is not a number or out of range, or a rank
            without a GPU for NCCL.
        RuntimeError: some of torchrun's variables are missing, srun started several processes
            without PMI, ranks did not join in time, or torch.distributed is already initialized.
    """
    if backend not in (None, *_BACKENDS):
        expected = ", ".join(repr(name) for name in _BACKENDS)
        raise ValueError(f"got backend {backend!r}; expected {expected} or None")
    if dist.is_initialized():
        raise RuntimeError(
            f"torch.distributed is initialized already (backend {dist.get_backend()!r}); "
            "call init_process_group once"
        )
    patience = timeout or default_pg_timeout
    mpi_processes = launchers.mpi_world_size(os.environ)
    cpu_backend = "gloo"
    if launchers.has_torchrun_variables(os.environ):
        process = launchers.torchrun_process(os.environ, patience)
    elif mpi_processes > 1:
        # Imported here: the import loads the MPI library.
        from syncbn.distributed.mpi.bootstrap import bootstrap

        process, cpu_backend = bootstrap(mpi_processes, patience), "mpi4py"
    else:
        process = LaunchedProcess(0, 1, 0, 1, dist.HashStore())
    every_rank_has_a_gpu = torch.cuda.device_count() >= process.local_world_size
    backend = backend or ("nccl" if every_rank_has_a_gpu else cpu_backend)
    device = _select_device(backend, process.local_rank)
    if backend == "mpi4py":
        _register_mpi4py(patience)
    # torch.distributed.nn.functional captures group.WORLD as a default argument. Imported after
    # initialization (by torch.compile or an optimizer's first step), it keeps the group alive:
    # Gloo's threads outlive destroy_process_group, and 1 % of processes abort at exit.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(
        backend,
        store=process.store,
        rank=process.rank,
        world_size=process.world_size,
        timeout=timeout,
    )
    # Not for NCCL: a second communicator takes GPU memory and time to start.
    if process.world_size > 1 and backend != "nccl":
        create_layers_group(timeout)
    return RankInfo(process.rank, process.world_size, process.local_rank, device)


def _register_mpi4py(timeout: timedelta) -> None:
    from syncbn.distributed.mpi.process_group import register

    register(timeout)
    expected = (*launchers.MPI_SIZES, *launchers.PMI_RANKS, "RANK")
    if not any(name in os.environ for name in expected):
        warnings.warn(
            "not started by mpirun: the mpi4py process group has a single rank", stacklevel=3
        )


def _select_device(backend: str, local_rank: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if backend != "nccl" and not gpus:
        return torch.device("cpu")
    if backend == "nccl" and local_rank >= gpus:
        raise ValueError(
            f"no GPU for local rank {local_rank}: {gpus} visible; start at most one rank per GPU, "
            "or use backend 'gloo'"
        )
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    return device
