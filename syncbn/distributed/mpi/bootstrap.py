"""Ranks and store of a process in a job started by mpirun or srun.

Process groups need a store. Rank 0 opens it on a free port and broadcasts its address by MPI.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from syncbn.distributed.launchers import LaunchedProcess
from syncbn.distributed.mpi import (
    MPI,
    VERSION,
    Result,
    call_with_timeout,
    ensure_initialized,
    install_abort_handler,
)


def bootstrap(launched: int, timeout: timedelta) -> LaunchedProcess:
    """Return this process's ranks and store in its MPI job; every rank must call this function.

    Args:
        launched: number of processes in the job according to the launcher.
        timeout: time limit of the wait for the other ranks.

    Raises:
        RuntimeError: the launcher belongs to another MPI than mpi4py's, ranks are missing, or the
            store cannot be opened.
    """
    ensure_initialized(timeout)
    world = MPI.COMM_WORLD
    if world.size != launched:
        raise RuntimeError(
            f"the launcher started {launched} processes, but MPI has {world.size}: mpirun belongs "
            f"to another MPI than the library that mpi4py loads ({VERSION}); use the mpirun that "
            "came with that library"
        )
    install_abort_handler()
    job = _wait(world.Dup, timeout, "for the other ranks")
    node = _wait(
        lambda: job.Split_type(MPI.COMM_TYPE_SHARED), timeout, "for the ranks of its machine"
    )
    try:
        store = _open_store(job, node.size == job.size, timeout)
        return LaunchedProcess(job.rank, job.size, node.rank, node.size, store)
    finally:
        node.Free()
        job.Free()


def _open_store(job: MPI.Intracomm, one_machine: bool, timeout: timedelta) -> dist.Store:
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
    return store or dist.TCPStore(host, port, job.size, False, timeout)


def _wait(function: Callable[[], Result], timeout: timedelta, purpose: str) -> Result:
    try:
        return call_with_timeout(function, timeout.total_seconds())
    except TimeoutError:
        raise RuntimeError(
            f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} waited "
            f"{timeout.total_seconds():g} s {purpose}; every rank of the job must call "
            "init_process_group"
        ) from None
