"""Store of a job on the host of rank 0, at an address from the environment."""

from __future__ import annotations

import errno
import os
import socket
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from syncbn.distributed.launchers import read_number


class LaunchedProcess(NamedTuple):
    """Rank, world size, local rank and store of a process in its job.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: number of processes of the job.
        local_rank: index of this process on its host; None if the launcher does not set it.
        store: key-value store shared by all ranks of the job.
        address: name or address of rank 0's host.
        has_mpi: True if MPI connects the ranks.
    """

    rank: int
    world_size: int
    local_rank: int | None
    store: dist.Store
    address: str
    has_mpi: bool


def open_store(
    rank: int,
    world_size: int,
    local_rank: int | None,
    address: tuple[str, int, str],
    timeout: timedelta,
) -> LaunchedProcess:
    """Open the store on rank 0, connect to it on other ranks.

    Args:
        rank: rank of this process.
        world_size: number of ranks.
        local_rank: index on this host, or None.
        address: host name, port, and the source of both for error messages.
        timeout: time limit of the connection.

    Raises:
        RuntimeError: the name does not resolve, the port is in use, or rank 0 did not open it.
    """
    host, port, source = address
    check_host(host, source)
    # An agent of torchrun may have opened the store already.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = rank == 0 and not agent
    try:
        store: dist.Store = dist.TCPStore(
            host, port, world_size, is_master, timeout, wait_for_workers=False
        )
    except RuntimeError as error:
        if is_master and "EADDRINUSE" in str(error):
            reason = f"port {port} is in use ({os.strerror(errno.EADDRINUSE)})"
            remedy = "set MASTER_PORT to a free port of that host on every rank"
        else:
            reason = str(error)
            remedy = "rank 0 must run on that host, and firewalls let the port pass"
        raise RuntimeError(
            f"rank {rank} of {world_size} cannot use the store of rank 0 at {host}:{port} (from "
            f"{source}): {reason}; {remedy}"
        ) from error
    # The agent's store outlives an attempt and a destroyed group, so old addresses remain in it.
    store = dist.PrefixStore("syncbn", store)
    if read_number(os.environ, "LOCAL_WORLD_SIZE", world_size) == world_size:
        # Agents of several nodes count attempts differently, so the count is no prefix there.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt_{attempt}", store)
    store = dist.PrefixStore(str(store.add(f"joined/{rank}", 1)), store)
    return LaunchedProcess(rank, world_size, local_rank, store, host, has_mpi=False)


def check_host(host: str, source: str) -> None:
    """Check that a host name resolves; a store would retry until its timeout.

    Raises:
        RuntimeError: the name does not resolve.
    """
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise RuntimeError(
            f"the host name {host!r} (from {source}) does not resolve on {socket.gethostname()}: "
            f"{error}; set MASTER_ADDR to a name that every host resolves, or an address"
        ) from error
