"""Ranks and store of a process in a job started by mpirun or srun.

Process groups need a store. Rank 0 opens it on a free port and broadcasts its address by MPI.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from syncbn.distributed.job_store import LaunchedProcess, check_host
from syncbn.distributed.launchers import LaunchedRank, Launcher
from syncbn.distributed.mpi import (
    MPI,
    VERSION,
    ensure_initialized,
    install_abort_handler,
)
from syncbn.distributed.timeouts import Result, call_with_timeout

_REMEDIES = {
    "mpirun": "use the mpirun that came with that library",
    "srun with PMI": (
        "srun --mpi=pmix serves Open MPI, and --mpi=pmi2 MPICH; plain srun with backend 'gloo' or "
        "'nccl' needs no MPI"
    ),
}


def bootstrap(launcher: Launcher, launched: LaunchedRank, timeout: timedelta) -> LaunchedProcess:
    """Return this process's ranks and store in its MPI job; every rank must call this function.

    Args:
        launcher: launcher of the job.
        launched: rank, world size and local rank according to the launcher.
        timeout: time limit of the wait for the other ranks.

    Raises:
        RuntimeError: the launcher belongs to another MPI than mpi4py's, ranks are missing, or the
            store cannot be opened.
    """
    ensure_initialized(timeout)
    world = MPI.COMM_WORLD
    size = launched.world_size
    if size is None:  # a rank of PMIx alone
        size = world.size if world.size > 1 else launched.rank + 1
    if world.size != size:
        raise RuntimeError(
            f"{launcher.name} started {'at least ' if launched.world_size is None else ''}{size} "
            f"processes, but MPI has {world.size}: mpi4py loads {VERSION}, which does not belong "
            f"to it; {_REMEDIES.get(launcher.name, _REMEDIES['mpirun'])}"
        )
    install_abort_handler()
    job = _wait(world.Dup, timeout, "for the other ranks")
    node = _wait(
        lambda: job.Split_type(MPI.COMM_TYPE_SHARED), timeout, "for the ranks of its machine"
    )
    try:
        store, host = _open_store(job, node.size == job.size, timeout)
        # Under SLURM, several nodes of one machine have the same shared memory, or none.
        local_rank = node.rank if launched.local_rank is None else launched.local_rank
        return LaunchedProcess(job.rank, job.size, local_rank, store, host, has_mpi=True)
    finally:
        node.Free()
        job.Free()


def _open_store(
    job: MPI.Intracomm, one_machine: bool, timeout: timedelta
) -> tuple[dist.Store, str]:
    """Return the store and the host of rank 0."""
    store, host, port, error = None, "localhost", 0, ""
    if job.rank == 0:
        if not one_machine:
            host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        try:
            port = int(os.environ.get("MASTER_PORT", "0"))
            store = dist.TCPStore(host, port, job.size, True, timeout, wait_for_workers=False)
            port = store.port
        except (RuntimeError, ValueError) as caught:
            error = str(caught)
    host, port, error = _wait(
        lambda: job.bcast((host, port, error)), timeout, "for the address of rank 0"
    )
    if error:
        raise RuntimeError(
            "rank 0 cannot open the job's store (its address is MASTER_ADDR and MASTER_PORT, if "
            f"set): {error}"
        )
    if store is None:
        check_host(host, "MASTER_ADDR or the host name of rank 0")
        store = dist.TCPStore(host, port, job.size, False, timeout)
    return store, host


def _wait(function: Callable[[], Result], timeout: timedelta, purpose: str) -> Result:
    try:
        return call_with_timeout(function, timeout.total_seconds())
    except TimeoutError:
        raise RuntimeError(
            f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} waited "
            f"{timeout.total_seconds():g} s {purpose}; every rank of the job must call "
            "init_process_group"
        ) from None
