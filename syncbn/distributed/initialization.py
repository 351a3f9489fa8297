"""Initialization of torch.distributed from the launcher's environment."""

from __future__ import annotations

import importlib
import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from syncbn.distributed import launchers
from syncbn.distributed.descriptions import inherited_timeout
from syncbn.distributed.groups import create_layers_group
from syncbn.distributed.handshake import (
    GLOO_INTERFACE,
    JobLayout,
    agree,
    publish,
    read_values,
    report_rank,
)
from syncbn.distributed.job_store import LaunchedProcess, open_store

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

    Supported are torchrun, mpirun, srun with and without PMI, and the variables RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT (:data:`.launchers.LAUNCHERS`). Without a launcher, the world size
    is 1, so the same program (DDP included) also runs as a single process. A default group that
    exists already is used as it is. On CUDA, the current device is set. Without a variable for the
    local rank, local ranks are counted by host name.

    Over Gloo and mpi4py, layers with ``process_group=None`` get a second group of all ranks,
    separate from the gradient buckets of DistributedDataParallel. It is destroyed with the default
    group.

    On several hosts, Gloo binds to the interface that reaches the host of rank 0, unless
    GLOO_SOCKET_IFNAME is set; this function sets it.

    Args:
        backend: "nccl", "gloo", "mpi4py" or None, the same on every rank. The default is NCCL if
            every rank has an unshared GPU; otherwise mpi4py in a job started by mpirun, or by srun
            with PMI, and Gloo in all other jobs.
        timeout: timeout of a collective; None for torch's default.

    Returns:
        Rank, world size, local rank and device.

    Raises:
        ImportError: mpi4py or an MPI library is needed and missing.
        ValueError: an unknown backend, or another one than on other ranks or of the existing group;
            a variable that is not a number or out of range; a rank without an unshared GPU for
            NCCL; an interface that cannot reach the other hosts.
        RuntimeError: variables are missing, ranks did not join in time, or the store of rank 0
            cannot be opened.
    """
    if backend not in (None, *_BACKENDS):
        expected = ", ".join(repr(name) for name in _BACKENDS)
        raise ValueError(f"got backend {backend!r}; expected {expected} or None")
    if dist.is_initialized():
        return _use_existing_group(backend)
    patience = timeout or default_pg_timeout
    process = _find_process(backend, patience)
    report = report_rank(os.environ, process.local_rank, backend, process.address)
    cpu_backend = "mpi4py" if process.has_mpi else "gloo"
    numbers = process.rank, process.world_size
    store = dist.PrefixStore("syncbn/handshake", process.store)
    layout = agree(store, *numbers, patience, report, cpu_backend)
    if layout.shares_gpus:
        warnings.warn(
            f"{layout.backend} on GPUs, since not every rank has an unshared GPU: collectives are "
            "far slower than over NCCL; start one rank per GPU",
            stacklevel=2,
        )
    device = _select_device(layout)
    if layout.interface is not None:
        os.environ[GLOO_INTERFACE] = layout.interface
    if layout.backend == "mpi4py":
        _register_mpi4py(patience)
    # torch.distributed.nn.functional captures group.WORLD as a default argument. Imported after
    # initialization (by torch.compile or an optimizer's first step), it keeps the group alive:
    # Gloo's threads outlive destroy_process_group, and 1 % of processes abort at exit.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        dist.init_process_group(
            layout.backend,
            store=process.store,
            rank=process.rank,
            world_size=process.world_size,
            timeout=timeout,
        )
        # Not for NCCL: a second communicator takes GPU memory and time to start.
        if process.world_size > 1 and layout.backend != "nccl":
            create_layers_group(timeout)
    except RuntimeError as error:
        if layout.backend != "gloo":
            raise
        place = f"rank {process.rank} of {process.world_size} on {socket.gethostname()}"
        raise RuntimeError(
            f"{place} cannot join the process group over Gloo, {layout.description}: {error}"
        ) from error
    return RankInfo(*numbers, layout.local_rank, device)


def _find_process(backend: str | None, timeout: timedelta) -> LaunchedProcess:
    """Return rank, world size, local rank and store of this process."""
    launcher = launchers.find_launcher(os.environ)
    if launcher is None:
        return LaunchedProcess(0, 1, 0, dist.HashStore(), "localhost", has_mpi=False)
    launched = launchers.read_rank(launcher, os.environ)
    if launched.world_size == 1 and launcher.address != "variables":
        return LaunchedProcess(0, 1, 0, dist.HashStore(), "localhost", has_mpi=False)
    address = launchers.find_address(launcher, os.environ)
    # Every rank must take the same way: mpirun may pass MASTER_ADDR to the ranks of one host only.
    by_srun = "SLURM_STEP_NUM_TASKS" in launcher.marks
    prefers_mpi = backend is None or not by_srun
    needs_mpi = backend == "mpi4py" or (prefers_mpi and find_spec("mpi4py") is not None)
    is_known = address is not None and launched.world_size is not None
    if launcher.address == "MPI" and (needs_mpi or not is_known):
        # Imported here: the import loads the MPI library.
        from syncbn.distributed.mpi.bootstrap import bootstrap

        return bootstrap(launcher, launched, timeout)
    assert address is not None
    assert launched.world_size is not None
    return open_store(launched.rank, launched.world_size, launched.local_rank, address, timeout)


def _use_existing_group(backend: str | None) -> RankInfo:
    """Return the RankInfo of an existing default group; a collective over its store."""
    existing = dist.get_backend()
    if backend not in (None, existing):
        raise ValueError(
            f"got backend {backend!r}, but torch.distributed is initialized with {existing!r}; "
            "expected None or the same backend"
        )
    rank, size, text = dist.get_rank(), dist.get_world_size(), os.environ.get("LOCAL_RANK", "")
    default = dist.group.WORLD
    assert default is not None
    # Over the store: NCCL would need the device that is to be found.
    store = dist.PrefixStore("syncbn/hosts", default.get_group_store())
    store = dist.PrefixStore(str(store.add(f"calls/{rank}", 1)), store)
    publish(store, rank, size, inherited_timeout() or default_pg_timeout, socket.gethostname())
    hosts = read_values(store, size)
    local_rank = int(text) if text.isdigit() else hosts[:rank].count(hosts[rank])
    return RankInfo(rank, size, local_rank, _device_of(default, local_rank))


def _device_of(group: dist.ProcessGroup, local_rank: int) -> torch.device:
    """Return the device of an existing group, and make it the current one."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return torch.device("cpu")
    if (bound := group.bound_device_id) is not None:
        index = bound.index
    else:
        # Device 0 is current, too, if no device has been set.
        index = torch.cuda.current_device() or local_rank % gpus
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _register_mpi4py(timeout: timedelta) -> None:
    from syncbn.distributed.mpi.process_group import register

    register(timeout)
    if launchers.find_launcher(os.environ) is None:
        warnings.warn(
            "not started by mpirun: the mpi4py process group has a single rank", stacklevel=3
        )


def _select_device(layout: JobLayout) -> torch.device:
    gpus = torch.cuda.device_count()
    if not gpus:
        return torch.device("cpu")
    device = torch.device("cuda", layout.local_rank % gpus)
    torch.cuda.set_device(device)
    return device
