"""Rendezvous of a group's processes by its store, then creation of its communicator."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from syncbn.distributed.handshake import publish, read_values
from syncbn.distributed.mpi import MPI
from syncbn.distributed.timeouts import call_with_timeout


class Peer(NamedTuple):
    """A process of a group.

    Attributes:
        world_rank: rank in MPI.COMM_WORLD.
        host: host name.
        pid: process id on the host.
        start_ticks: start time of the process, in the host's clock ticks; -1 if unknown.
        namespace: scope of the process id; empty if unknown.
        debug: True if TORCH_DISTRIBUTED_DEBUG is DETAIL.
    """

    world_rank: int
    host: str
    pid: int
    start_ticks: int
    namespace: str
    debug: bool

    def has_ended(self) -> bool:
        """Return whether the process is known to have ended; false in another pid namespace."""
        if not self.namespace or self.namespace != _namespace():
            return False
        try:
            state, start_ticks = _state_and_start(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:
            return False
        # A zombie, or another process with the same id.
        return state in "ZX" or start_ticks != self.start_ticks


def rendezvous(store: dist.Store, rank: int, size: int, timeout: float, peer: Peer) -> list[Peer]:
    """Wait for all ranks of a new group; return its peers by rank.

    Args:
        store: store of the group.
        rank: rank of this process in the group.
        size: size of the group.
        timeout: time limit in seconds.
        peer: this process.

    Raises:
        RuntimeError: ranks did not arrive in time; the message lists them.
    """
    try:
        publish(store, rank, size, timedelta(seconds=timeout), json.dumps(peer))
    except TimeoutError as error:
        raise RuntimeError(
            f"{error} to create an MPI process group; every member must create it"
        ) from None
    return [Peer(*json.loads(text)) for text in read_values(store, size)]


def local_peer() -> Peer:
    """Return this process."""
    pid, namespace = os.getpid(), _namespace()
    start_ticks = _state_and_start(pid)[1] if namespace else -1
    debug = dist.get_debug_level() == dist.DebugLevel.DETAIL
    return Peer(MPI.COMM_WORLD.rank, socket.gethostname(), pid, start_ticks, namespace, debug)


def create_communicator(world_ranks: Sequence[int], timeout: float) -> MPI.Intracomm:
    """Return a new communicator; all members must call this function after :func:`rendezvous`.

    Args:
        world_ranks: ranks in MPI.COMM_WORLD, by rank in the group.
        timeout: time limit in seconds; exceeded if a member ends meanwhile.

    Raises:
        RuntimeError: a timeout, or the processes do not belong to one MPI job.
    """
    if len(set(world_ranks)) < len(world_ranks):
        raise RuntimeError(
            f"the {len(world_ranks)} ranks of the group are ranks {world_ranks} of MPI.COMM_WORLD, "
            "which must differ; start the job with mpirun, or use backend 'gloo' with torchrun"
        )
    members = MPI.COMM_WORLD.group.Incl(world_ranks)
    try:
        communicator = call_with_timeout(lambda: MPI.COMM_WORLD.Create_group(members), timeout)
    except TimeoutError:
        raise RuntimeError(
            f"MPI has not created a group of the ranks {world_ranks} after {timeout:g} s; one of "
            "them has ended"
        ) from None
    members.Free()
    communicator.Set_errhandler(MPI.ERRORS_RETURN)
    return communicator


def _state_and_start(pid: int) -> tuple[str, int]:
    # Fields 3 and 22 of proc(5)'s stat; field 2 is a name in brackets that may hold any character.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


@cache
def _namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
