"""What a rank knows of the others while it waits for them.

MPI by itself waits forever for a process that is gone. Here a wait of more than a second starts a
thread that looks at the group's store and at the processes of this machine, once a second; a wait
that has become hopeless ends with an error that says where everyone is. All communication is by the
store, which must work when MPI does not; and on a connection and a thread of its own, made then,
because the store may not answer either.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple

import torch.distributed as dist

from syncbn.distributed.bounded import bounded
from syncbn.distributed.mpi_peers import Peer

_SECONDS_BETWEEN_LOOKS = 1.0
# After the last wait that asked.
_SECONDS_OF_INTEREST = 5.0
# A rank that has come to its end may still have a last message on its way.
_SECONDS_AFTER_LEAVING = 10.0
# How long a rank that gives up waits for the others, who look less often, to say where they are.
_SECONDS_FOR_REPORTS = 1.5
_SECONDS_FOR_THE_STORE = 1.0
# How long rank 0, at its end, keeps a store for the others.
_SECONDS_FOR_OTHERS = 10.0


class Need(NamedTuple):
    """What an operation needs of other ranks.

    Attributes:
        number: of a collective among the group's, from 1; 0 for point to point.
        ranks: whose part it cannot do without; () for all, None for any one of the others.
        timeout: seconds it may take; None for the group's.
    """

    number: int = 0
    ranks: Sequence[int] | None = ()
    timeout: float | None = None


class Watch:
    """Tells hopeless waits from long ones.

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
        #: Whether somebody has been told why.
        self.has_told = False
        self._parent_store = store
        self._rank = rank
        self._peers = peers
        self._others = [other for other in range(len(peers)) if other != rank]
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        # Found by the thread: who is gone; who has left, when that was seen, and after how many
        # collectives; whether another rank has given up.
        self._ended: set[int] = set()
        self._left: dict[int, tuple[float, int]] = {}
        self._trouble = False
        self._store_is_lost = False
        self._last_look = 0.0

    def look(self, operation: object, need: Need, waited: float) -> None:
        """Raise if an operation will never be done. Does not block before it raises.

        Args:
            operation: its text goes into the message.
            need: of the operation.
            waited: seconds.

        Raises:
            RuntimeError: its time is over, a rank it needs is gone, or another rank has given up.
        """
        if self.failure:
            raise RuntimeError(self.failure)
        self._last_look = time.monotonic()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look_around, daemon=True)
            self._thread.start()
        if reason := self._hopeless(need, waited):
            raise RuntimeError(self.fail(operation, reason))

    def fail(self, operation: object, reason: str) -> str:
        """Tell the other ranks that the group is broken; return why, and where the others are.

        Args:
            operation: what this rank is in.
            reason: what is wrong with it.
        """
        with self._lock:
            if not self.failure:
                reports: dict[int, str] = {}
                patience = min(_SECONDS_FOR_REPORTS, self.timeout)
                # Without the store, or its answer, reports are missing.
                with suppress(RuntimeError, TimeoutError):
                    bounded(
                        lambda: self._exchange_reports(operation, reports, patience),
                        patience + _SECONDS_FOR_THE_STORE,
                    )
                first = f"{operation} on {self._name(self._rank)} of {len(self._peers)} {reason}"
                lines = [f"  {self._name(o)}: {self._where(o, reports)}" for o in self._others]
                self.failure = "\n".join([first, *lines])
        return self.failure

    def leave(self, collectives: int, keeps_store: bool) -> None:
        """Tell the other ranks that this one will start nothing more in the group.

        Args:
            collectives: that it has started.
            keeps_store: wait a little for the others to say so too.
        """
        self._closing.set()
        if self._thread is not None:
            # Or it might come back from the store to an interpreter that is gone.
            self._thread.join(_SECONDS_FOR_THE_STORE)
        if self._store_is_lost:
            return
        patience = _SECONDS_FOR_OTHERS if keeps_store else 0.0
        with suppress(RuntimeError, TimeoutError):
            bounded(
                lambda: self._announce_end(collectives, patience), patience + _SECONDS_FOR_THE_STORE
            )

    def _hopeless(self, need: Need, waited: float) -> str:
        timeout = self.timeout if need.timeout is None else need.timeout
        if waited >= timeout:
            return f"is not done after {waited:.1f} s (timeout {timeout:g} s)"
        if self._trouble:
            return "was given up by another rank"
        missing = [self._is_missing(rank, need.number) for rank in need.ranks or self._others]
        if missing and (all(missing) if need.ranks is None else any(missing)):
            return "lost a rank"
        return ""

    def _is_missing(self, rank: int, number: int) -> bool:
        if rank not in self._left:
            return rank in self._ended
        seen, collectives = self._left[rank]
        if number:
            return collectives < number
        return time.monotonic() - seen > _SECONDS_AFTER_LEAVING

    @cached_property
    def _store(self) -> dist.Store:
        store: dist.Store = self._parent_store.clone()  # type: ignore[attr-defined]  # not in stub
        return store

    def _look_around(self) -> None:
        while not (self._closing.is_set() or self.failure or self._is_idle()):
            self._ended = {rank for rank in self._others if self._peers[rank].has_ended()}
            if not self._store_is_lost:
                try:
                    self._read_the_store()
                except RuntimeError:
                    self._store_is_lost = True  # its process may be at its end, which is no error
            self._closing.wait(_SECONDS_BETWEEN_LOOKS)

    def _is_idle(self) -> bool:
        return time.monotonic() - self._last_look > _SECONDS_OF_INTEREST

    def _read_the_store(self) -> None:
        self._trouble = self._store.check(["trouble"])
        for rank in self._others:
            if rank not in self._left and self._store.check([f"left/{rank}"]):
                collectives = int(self._store.get(f"left/{rank}"))
                self._left[rank] = time.monotonic(), collectives

    def _announce_end(self, collectives: int, patience: float) -> None:
        # By the parent if possible: a connection more, with its look into the DNS, is not free.
        store = self._parent_store if self._thread is None else self._store
        store.set(f"left/{self._rank}", str(collectives))
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if store.check([f"left/{rank}" for rank in self._others]):
                return
            if any(self._peers[rank].has_ended() for rank in self._others):
                return
            time.sleep(0.01)

    def _exchange_reports(
        self, operation: object, reports: dict[int, str], patience: float
    ) -> None:
        self._store.set(f"in/{self._rank}", str(operation))
        self._store.set("trouble", "")
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            for rank in self._unheard(reports):
                if self._store.check([f"in/{rank}"]):
                    reports[rank] = self._store.get(f"in/{rank}").decode()
            if all(self._peers[rank].has_ended() for rank in self._unheard(reports)):
                return
            time.sleep(0.05)

    def _unheard(self, reports: Iterable[int]) -> list[int]:
        return [rank for rank in self._others if rank not in reports]

    def _where(self, rank: int, reports: dict[int, str]) -> str:
        peer = self._peers[rank]
        process = f"process {peer.pid} on {peer.host}"
        if rank in self._left:
            return f"has come to its end ({process})"
        if peer.has_ended():
            return f"has ended ({process})"
        if rank in reports:
            return f"is in {reports[rank]}"
        return f"has not come to this operation ({process}); see what it does instead"

    def _name(self, rank: int) -> str:
        world_rank = self._peers[rank].world_rank
        return f"rank {rank}" if world_rank == rank else f"rank {rank} (global {world_rank})"
