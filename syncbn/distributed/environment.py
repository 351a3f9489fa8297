"""From what the launcher left in the environment to an initialized default process group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Set for every process by launchers that are not supported yet, with the number of processes.
_OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands in the job.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: processes in the job.
        local_rank: number of this process on its machine.
        device: where this rank's tensors belong.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def init_process_group(backend: str | None = None, timeout: timedelta | None = None) -> RankInfo:
    """Initialize torch.distributed for the launcher that started this process.

    Reads the environment of torchrun. A process that no launcher started becomes a group of one,
    so that the same program (DDP included) runs alone. On CUDA the current device is set.

    Args:
        backend: "nccl", "gloo", or None for NCCL when every local rank has a GPU, Gloo otherwise.
        timeout: how long a collective may wait for another rank; None for torch's default.

    Returns:
        Rank, world size, local rank and device.

    Raises:
        ValueError: an unknown backend, a variable that is not a number or out of range, or a rank
            without a GPU for NCCL.
        RuntimeError: some of torchrun's variables are missing, another launcher started several
            processes, or torch.distributed is initialized already.
    """
    if backend not in (None, "nccl", "gloo"):
        raise ValueError(f"got backend {backend!r}; expected 'nccl', 'gloo' or None")
    if dist.is_initialized():
        raise RuntimeError(
            f"torch.distributed is initialized already (backend {dist.get_backend()!r}); "
            "call init_process_group once"
        )
    place = _read_environment(os.environ)
    # Without it all ranks are taken to be on one node: every rank must choose the same backend.
    local_world = _number(os.environ, "LOCAL_WORLD_SIZE", place.world_size)
    backend = backend or ("nccl" if torch.cuda.device_count() >= local_world else "gloo")
    device = _device(backend, place.local_rank)
    store = None if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group(
        backend,
        store=store,
        rank=place.rank if store is not None else -1,
        world_size=place.world_size if store is not None else -1,
        timeout=timeout,
    )
    return RankInfo(place.rank, place.world_size, place.local_rank, device)


@dataclass(frozen=True)
class _Place:
    rank: int
    world_size: int
    local_rank: int


def _read_environment(environ: Mapping[str, str]) -> _Place:
    present = [name for name in _TORCHRUN if name in environ]
    if "RANK" not in present and "WORLD_SIZE" not in present and "LOCAL_RANK" not in present:
        for name in _OTHER_LAUNCHERS:
            if _number(environ, name, 1) > 1:
                raise RuntimeError(
                    f"{name}={environ[name]}: started by mpirun or srun, which are not supported "
                    "yet; start with torchrun (launch/torchrun.sh)"
                )
        return _Place(0, 1, 0)
    missing = [name for name in _TORCHRUN if name not in environ]
    if missing:
        raise RuntimeError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}; start with "
            "torchrun, which sets them all, or unset them all to run alone"
        )
    _number(environ, "MASTER_PORT")
    place = _Place(*(_number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if place.rank >= place.world_size:
        raise ValueError(
            f"got RANK={place.rank} with WORLD_SIZE={place.world_size}; "
            f"expected a rank from 0 to {place.world_size - 1}"
        )
    return place


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in environ and default is not None:
        return default
    text = environ[name]
    if not text.isdigit():
        raise ValueError(f"got {name}={text!r}; expected a non-negative integer")
    return int(text)


def _device(backend: str, local_rank: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if backend != "nccl" and not gpus:
        return torch.device("cpu")
    if backend == "nccl" and local_rank >= gpus:
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: {gpus} visible; start at most "
            "one rank a GPU, or use backend 'gloo'"
        )
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    return device
