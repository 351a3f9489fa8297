"""The place of a process in a job that mpirun or srun started, and a store for the job.

Torch's groups need a store. Rank 0 opens one on a port that the system chooses, and MPI tells the
others where.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from syncbn.distributed.bounded import bounded
from syncbn.distributed.mpi_exit import watch_for_errors
from syncbn.distributed.mpi_library import LIBRARY, MPI, start
from syncbn.distributed.place import Place

_ADDRESS_BYTES = 1024
_ERROR = "error: "
# MPI may still write to the memory of requests that nobody waits for any more.
_given_up: list[MPI.Request] = []


def find_place(launched: int, timeout: timedelta) -> Place:
    """Return this process's place in its MPI job; every rank must call this.

    Args:
        launched: processes in the job, as its launcher says.
        timeout: how long to wait for the other ranks.

    Raises:
        RuntimeError: the launcher belongs to another MPI than mpi4py's, ranks are missing, or the
            store cannot be opened.
    """
    start(timeout)
    world = MPI.COMM_WORLD
    if world.size != launched:
        raise RuntimeError(
            f"the launcher started {launched} processes, but MPI sees {world.size}: mpirun belongs "
            f"to another MPI than the library that mpi4py loads ({LIBRARY}); use the mpirun that "
            "came with that library"
        )
    watch_for_errors()
    job, request = world.Idup()
    _wait(request, timeout, "to start")
    try:
        node = bounded(
            lambda: job.Split_type(MPI.COMM_TYPE_SHARED), seconds=timeout.total_seconds()
        )
    except TimeoutError:
        raise RuntimeError(
            f"rank {job.rank} of {job.size} waited {timeout.total_seconds():g} s for the ranks of "
            "its machine; one of them has ended"
        ) from None
    try:
        store = _open_store(job, node.size == job.size, timeout)
        return Place(job.rank, job.size, node.rank, node.size, store)
    finally:
        node.Free()
        job.Free()


def _open_store(job: MPI.Intracomm, one_machine: bool, timeout: timedelta) -> dist.Store:
    message = bytearray(_ADDRESS_BYTES)
    store: dist.Store | None = None
    if job.rank == 0:
        try:
            host = "localhost" if one_machine else _own_address(os.environ)
            port = int(os.environ.get("MASTER_PORT", "0"))
            store = dist.TCPStore(host, port, job.size, True, timeout, wait_for_workers=False)
            text = f"{host} {store.port}"
        except (RuntimeError, ValueError) as error:
            text = f"{_ERROR}{error}"
        encoded = text.encode()[:_ADDRESS_BYTES]
        message[: len(encoded)] = encoded
    _wait(job.Ibcast([message, MPI.BYTE], 0), timeout, "for the address of rank 0")
    text = message.rstrip(b"\0").decode(errors="replace")
    if text.startswith(_ERROR):
        raise RuntimeError(
            "rank 0 cannot open the job's store (MASTER_ADDR and MASTER_PORT say where, if set): "
            + text.removeprefix(_ERROR)
        )
    if store is None:
        host, port_text = text.split()
        store = dist.TCPStore(host, int(port_text), job.size, False, timeout)
    return store


def _own_address(environ: Mapping[str, str]) -> str:
    return environ.get("MASTER_ADDR") or socket.gethostname()


def _wait(request: MPI.Request, timeout: timedelta, what: str) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    while not request.Test():
        if time.monotonic() > deadline:
            _given_up.append(request)
            raise RuntimeError(
                f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} waited "
                f"{timeout.total_seconds():g} s {what}; every rank of the job must call "
                "init_process_group"
            )
        time.sleep(1e-4)
