"""The processes of a group: how they find each other, and whether one is gone."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch.distributed as dist

from syncbn.distributed.mpi_agreement import is_wanted


@dataclass(frozen=True)
class Peer:
    """A process of a group.

    Attributes:
        world_rank: its rank in MPI.COMM_WORLD.
        host: name of its machine.
        pid: its process number there.
        started: when that process started, in the clock ticks of its machine; -1 if unknown.
        namespace: where its number is valid; empty if unknown.
        compares: whether it wants the ranks to compare collectives before they start them.
    """

    world_rank: int
    host: str
    pid: int
    started: int
    namespace: str
    compares: bool

    def has_ended(self) -> bool:
        """Whether it is known to be gone: only of processes that this one can see."""
        if not self.namespace or self.namespace != _namespace():
            return False
        try:
            state, started = _state_and_start(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:
            return False
        # Dead and not yet buried, or another process with its number.
        return state in "ZX" or started != self.started


def meet(store: dist.Store, rank: int, size: int, timeout: float, me: Peer) -> list[Peer]:
    """Wait until all ranks of a new group are here; return them in the order of their ranks.

    Args:
        store: of the group alone.
        rank: of this process in the group.
        size: of the group.
        timeout: seconds.
        me: this process.

    Raises:
        RuntimeError: some did not come in time; the message names them.
    """
    store.set(f"peer/{rank}", json.dumps(asdict(me)))
    keys = [f"peer/{other}" for other in range(size)]
    deadline = time.monotonic() + timeout
    pause = 1e-3
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            raise RuntimeError(
                f"rank {rank} of {size} waited {timeout:g} s for ranks {missing} to create an "
                "MPI process group; every member must create it"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return [Peer(**json.loads(store.get(key))) for key in keys]


def myself(world_rank: int) -> Peer:
    """Return this process, whose rank in MPI.COMM_WORLD is given."""
    pid, namespace = os.getpid(), _namespace()
    started = _state_and_start(pid)[1] if namespace else -1
    return Peer(world_rank, socket.gethostname(), pid, started, namespace, is_wanted())


def _state_and_start(pid: int) -> tuple[str, int]:
    # Fields 3 and 22 of proc(5)'s stat; the second is a name in brackets that may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


@cache
def _namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
