"""Who is in a group, who has left it, and what everyone waits for.

MPI by itself waits forever for a process that is gone. Here a wait of more than a second looks at
the group's store and at the processes of its own machine, and ends with an error that names the
operation and the missing ranks. All communication of this file is by the store: it must work when
MPI does not.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

_SECONDS_BETWEEN_LOOKS = 1.0
# A rank that has come to its end may still have a last message on its way.
_SECONDS_AFTER_LEAVING = 10.0
# How long a rank that gives up waits for the others to say where they are: they look less often.
_SECONDS_FOR_REPORTS = 1.5


@dataclass(frozen=True)
class Peer:
    """A process of a group.

    Attributes:
        world_rank: its rank in MPI.COMM_WORLD.
        world_size: size of its MPI.COMM_WORLD.
        host: name of its machine.
        pid: its process number there.
        namespace: where this number is valid; empty if that cannot be known.
    """

    world_rank: int
    world_size: int
    host: str
    pid: int
    namespace: str

    def has_ended(self) -> bool:
        """Whether it is known to be gone: only of processes that this one can see."""
        if not self.namespace or self.namespace != _pid_namespace():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state in "ZX"


def meet(
    store: dist.Store, rank: int, size: int, timeout: float, world_rank: int, world_size: int
) -> list[Peer]:
    """Wait until all ranks of a new group are here; return them in the order of their ranks.

    Args:
        store: of the group alone.
        rank: of this process in the group.
        size: of the group.
        timeout: seconds.
        world_rank: of this process in MPI.COMM_WORLD.
        world_size: of its MPI.COMM_WORLD.

    Raises:
        RuntimeError: some did not come in time; the message names them.
    """
    me = Peer(world_rank, world_size, socket.gethostname(), os.getpid(), _pid_namespace())
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


class Watch:
    """What a rank knows of the others while it waits.

    Args:
        store: of the group alone.
        rank: of this process in the group.
        peers: the processes of the group, by rank.
        timeout: seconds after which a wait is given up.
    """

    def __init__(self, store: dist.Store, rank: int, peers: Sequence[Peer], timeout: float) -> None:
        self.timeout = timeout
        #: Why the group cannot be used any more; empty while it can.
        self.failure = ""
        self._store = store
        self._rank = rank
        self._peers = peers
        self._last_look = 0.0
        self._left: dict[int, float] = {}  # when a rank was first seen to have left
        self._lock = threading.Lock()

    def look(
        self,
        operation: object,
        waited: float,
        timeout: float | None = None,
        peer: int | None = None,
    ) -> None:
        """Raise if an operation will never be done.

        Args:
            operation: what this rank waits for; its text goes into the message.
            waited: seconds since it was started.
            timeout: seconds it may take; None for the group's.
            peer: the only rank that it needs; None if it needs all.

        Raises:
            RuntimeError: its time is over, a rank has ended, or another rank has given up.
        """
        if self.failure:
            raise RuntimeError(self.failure)
        now = time.monotonic()
        timeout = self.timeout if timeout is None else timeout
        if now - self._last_look < _SECONDS_BETWEEN_LOOKS and waited < timeout:
            return
        self._last_look = now
        needed = range(len(self._peers)) if peer is None else [peer]
        if reason := self._hopeless(waited, timeout, needed):
            raise RuntimeError(self.fail(operation, reason))

    def leave(self) -> None:
        """Tell the other ranks that this one is at its end."""
        with suppress(RuntimeError):  # the store may be gone with its process
            self._store.set(f"left/{self._rank}", "")
            self._store.set("leaving", "")

    def fail(self, operation: object, reason: str) -> str:
        """Tell the other ranks that the group is broken; return why, and where the others are.

        Args:
            operation: what this rank is in.
            reason: what is wrong with it.
        """
        with self._lock:
            if not self.failure:
                first = f"{operation} on rank {self._rank} of {len(self._peers)} {reason}"
                self.failure = "\n".join([first, *self._reports(operation)])
        return self.failure

    def _hopeless(self, waited: float, timeout: float, needed: Sequence[int]) -> str:
        if waited >= timeout:
            return f"is not done after {waited:.1f} s (timeout {timeout:g} s)"
        if any(self._peers[rank].has_ended() for rank in needed):
            return "lost a rank"
        try:
            if self._store.check(["trouble"]):
                return "was given up by another rank"
            if self._store.check(["leaving"]) and self._have_left(needed):
                return "waits for a rank that is at its end"
        except RuntimeError as error:
            return f"lost the process that keeps the store ({str(error).partition(chr(10))[0]})"
        return ""

    def _have_left(self, needed: Sequence[int]) -> bool:
        now = time.monotonic()
        for rank in needed:
            if rank != self._rank and self._store.check([f"left/{rank}"]):
                self._left.setdefault(rank, now)
        return any(now - self._left.get(rank, now) > _SECONDS_AFTER_LEAVING for rank in needed)

    def _reports(self, operation: object) -> list[str]:
        others = [rank for rank in range(len(self._peers)) if rank != self._rank]
        reported: dict[int, str] = {}
        with suppress(RuntimeError):  # the store may be gone with its process
            self._store.set(f"in/{self._rank}", str(operation))
            self._store.set("trouble", "")
            deadline = time.monotonic() + min(_SECONDS_FOR_REPORTS, self.timeout)
            while time.monotonic() < deadline:
                for rank in others:
                    if rank not in reported and self._store.check([f"in/{rank}"]):
                        reported[rank] = self._store.get(f"in/{rank}").decode()
                if all(rank in reported or self._peers[rank].has_ended() for rank in others):
                    break
                time.sleep(0.05)
        return [f"  rank {rank}: {self._where(rank, reported.get(rank))}" for rank in others]

    def _where(self, rank: int, report: str | None) -> str:
        peer = self._peers[rank]
        process = f"process {peer.pid} on {peer.host}"
        if peer.has_ended():
            return f"has ended ({process})"
        if report is not None:
            return f"is in {report}"
        if rank in self._left:
            return f"has come to its end ({process})"
        return f"has not come to this operation ({process}); see what it does instead"


def _pid_namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
