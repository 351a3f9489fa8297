"""From what the launcher left in the environment to an initialized default process group."""

from __future__ import annotations

import importlib
import os
import socket
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from syncbn.distributed.groups import create_layers_group
from syncbn.distributed.launcher import MPI_SIZES, PMI_RANKS
from syncbn.distributed.place import Place

_BACKENDS = ("nccl", "gloo", "mpi4py")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# As for torch itself; local ranks are then counted by host name.
_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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

    Reads the environment of torchrun, else that of mpirun or of srun with PMI. A process that no
    launcher started becomes a group of one, so that the same program (DDP included) runs alone. On
    CUDA the current device is set. Without LOCAL_RANK, local ranks are counted by host name.

    Over Gloo and mpi4py, layers with ``process_group=None`` get a second group of all ranks, apart
    from the gradient buckets of DistributedDataParallel. It ends with the default group.

    Args:
        backend: "nccl", "gloo", "mpi4py", or None for NCCL when every local rank has a GPU, else
            mpi4py in a job started by mpirun or srun, else Gloo.
        timeout: how long a collective may wait for another rank; None for torch's default.

    Returns:
        Rank, world size, local rank and device.

    Raises:
        ImportError: mpi4py or an MPI library is needed and missing.
        ValueError: an unknown backend, a variable that is not a number or out of range, or a rank
            without a GPU for NCCL.
        RuntimeError: some of torchrun's variables are missing, srun started several processes
            without PMI, ranks do not come, or torch.distributed is initialized already.
    """
    if backend not in (None, *_BACKENDS):
        expected = ", ".join(repr(name) for name in _BACKENDS)
        raise ValueError(f"got backend {backend!r}; expected {expected} or None")
    if dist.is_initialized():
        raise RuntimeError(
            f"torch.distributed is initialized already (backend {dist.get_backend()!r}); "
            "call init_process_group once"
        )
    processes = _mpi_processes(os.environ)
    if any(name in os.environ for name in _TORCHRUN[:3]):
        place = _torchrun_place(os.environ, timeout or default_pg_timeout)
        backend_without_gpus = "gloo"
    elif processes > 1:
        # Imported here: importing it starts MPI.
        from syncbn.distributed import mpi_launch

        place = mpi_launch.find_place(processes, timeout or default_pg_timeout)
        backend_without_gpus = "mpi4py"
    else:
        place, backend_without_gpus = Place(0, 1, 0, 1, dist.HashStore()), "gloo"
    every_rank_has_a_gpu = torch.cuda.device_count() >= place.local_world_size
    backend = backend or ("nccl" if every_rank_has_a_gpu else backend_without_gpus)
    device = _device(backend, place.local_rank)
    if backend == "mpi4py":
        _register_mpi4py(os.environ, timeout or default_pg_timeout)
    # It has the default group for a default argument, and keeps that for good if there is one when
    # it is imported, as by torch.compile or an optimizer's first step. Then Gloo's threads outlive
    # destroy_process_group, and abort one process in a hundred at its end.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(
        backend,
        store=place.store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )
    # Not for NCCL: a second communicator takes GPU memory and time to start.
    if place.world_size > 1 and backend != "nccl":
        create_layers_group(timeout)
    return RankInfo(place.rank, place.world_size, place.local_rank, device)


def _torchrun_place(environ: Mapping[str, str], timeout: timedelta) -> Place:
    missing = [name for name in _REQUIRED if name not in environ]
    if missing:
        present = [name for name in _TORCHRUN if name in environ]
        raise RuntimeError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}; start with "
            "torchrun, which sets them all, or unset them all to run alone"
        )
    _number(environ, "MASTER_PORT")
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if rank >= world_size:
        raise ValueError(
            f"got RANK={rank} with WORLD_SIZE={world_size}; "
            f"expected a rank from 0 to {world_size - 1}"
        )
    local_rank = _number(environ, "LOCAL_RANK", 0)
    # Without it all ranks are taken to be on one node: every rank must choose the same backend.
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", world_size)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    if local_world_size == world_size:
        # The agent's store outlives an attempt and a destroyed group, and with them old addresses.
        # Agents of several nodes count attempts differently, so the count is no prefix there.
        attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"syncbn/attempt_{attempt}", store)
        store = dist.PrefixStore(str(store.add(f"joined/{rank}", 1)), store)
    if "LOCAL_RANK" not in environ:
        local_rank, local_world_size = _place_on_host(store, rank, world_size)
    return Place(rank, world_size, local_rank, local_world_size, store)


def _place_on_host(store: dist.Store, rank: int, world_size: int) -> tuple[int, int]:
    """Return local rank and local world size, from the host names of all ranks."""
    host = socket.gethostname()
    store.set(f"host/{rank}", host)
    hosts = [store.get(f"host/{other}").decode() for other in range(world_size)]
    # The largest count, since every rank must choose the same backend.
    return hosts[:rank].count(host), max(Counter(hosts).values())


def _mpi_processes(environ: Mapping[str, str]) -> int:
    sizes = [_number(environ, name) for name in MPI_SIZES if name in environ]
    # An mpirun of one process within a SLURM job has inherited the size of that.
    if max(sizes, default=1) > 1 or "OMPI_COMM_WORLD_SIZE" in environ:
        return max(sizes)
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", 1)
    if tasks > 1 and "RANK" not in environ and not any(name in environ for name in PMI_RANKS):
        raise RuntimeError(
            f"SLURM_STEP_NUM_TASKS={tasks}: srun started several processes without setting up MPI; "
            "use 'srun --mpi=pmix' (or pmi2), or start torchrun once on each node"
        )
    return tasks


def _register_mpi4py(environ: Mapping[str, str], timeout: timedelta) -> None:
    from syncbn.distributed import mpi

    mpi.register(timeout)
    if not any(name in environ for name in (*MPI_SIZES, *PMI_RANKS, "RANK")):
        warnings.warn(
            "not started by mpirun: the mpi4py process group has this process alone", stacklevel=3
        )


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
