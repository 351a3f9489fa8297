"""Detection of operations that can never complete.

MPI waits forever for a process that has ended. After a wait of one second, the watchdog starts a
thread that polls the group's store and the processes of this machine once a second. A wait that
cannot complete ends with an error that says where every rank is. The watchdog communicates by the
store, which must work when MPI does not, on a separate connection and thread, since the store may
not answer either.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from typing import NamedTuple

import torch.distributed as dist

from syncbn.distributed.mpi.rendezvous import Peer
from syncbn.distributed.timeouts import call_with_timeout

_POLL_SECONDS = 1.0
# The thread ends this long after the last check.
_IDLE_SECONDS = 5.0
# A rank that has left the group may still have a last message in flight.
_GRACE_SECONDS = 10.0
# A failing rank waits this long for the reports of the other ranks, whose polls are less frequent.
_REPORT_SECONDS = 1.5
_STORE_SECONDS = 1.0
# At exit, rank 0 keeps the store alive this long for the other ranks.
_STORE_GRACE_SECONDS = 10.0


class Dependencies(NamedTuple):
    """Ranks that an operation depends on.

    Attributes:
        seq: sequence number of a collective in its group, from 1; 0 for point to point.
        ranks: ranks that must take part; () for all, None for any one other rank.
        timeout: time limit; zero or negative for the group's timeout.
    """

    seq: int = 0
    ranks: Sequence[int] | None = ()
    timeout: timedelta = timedelta(0)


class Watchdog:
    """Ends waits that cannot complete.

    Args:
        store: store of the group.
        rank: rank of this process in the group.
        peers: processes of the group, by rank.
        timeout: time limit of an operation in seconds.
    """

    def __init__(self, store: dist.Store, rank: int, peers: Sequence[Peer], timeout: float) -> None:
        self.timeout = timeout
        #: Reason for the group's failure; empty while the group works.
        self.failure = ""
        #: Whether the failure has been raised to a caller.
        self.error_reported = False
        self._parent_store = store
        self._rank = rank
        self._peers = peers
        self._others = [other for other in range(len(peers)) if other != rank]
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        # Written by the thread. Of ranks that left: time of discovery, number of collectives.
        self._ended: set[int] = set()
        self._left: dict[int, tuple[float, int]] = {}
        self._peer_failed = False
        self._store_lost = False
        self._last_check = 0.0

    def check(self, operation: object, dependencies: Dependencies, waited: float) -> None:
        """Raise if an operation can never complete. Does not block before it raises.

        Args:
            operation: operation in flight; its text goes into the message.
            dependencies: ranks that the operation depends on.
            waited: duration of the wait so far, in seconds.

        Raises:
            RuntimeError: a timeout, a required rank has ended, or another rank has failed.
        """
        if self.failure:
            raise RuntimeError(self.failure)
        self._last_check = time.monotonic()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        if reason := self._failure_reason(dependencies, waited):
            raise RuntimeError(self.fail(operation, reason))

    def fail(self, operation: object, reason: str) -> str:
        """Mark the group as failed on all ranks; return the reason and the state of every rank.

        Args:
            operation: operation of this rank.
            reason: predicate of the operation, for the message.
        """
        with self._lock:
            if not self.failure:
                reports: dict[int, str] = {}
                patience = min(_REPORT_SECONDS, self.timeout)
                # Without an answer of the store, the reports are missing.
                with suppress(RuntimeError, TimeoutError):
                    call_with_timeout(
                        lambda: self._exchange_reports(operation, reports, patience),
                        patience + _STORE_SECONDS,
                    )
                first = f"{operation} on {self._name(self._rank)} of {len(self._peers)} {reason}"
                lines = [f"  {self._name(o)}: {self._state(o, reports)}" for o in self._others]
                self.failure = "\n".join([first, *lines])
        return self.failure

    def leave(self, collectives: int, keeps_store: bool) -> None:
        """Announce that this rank starts no more operations in the group.

        Args:
            collectives: number of collectives that this rank has started.
            keeps_store: True for the rank that holds the store; it waits a little for all ranks to
                leave.
        """
        self._closing.set()
        if self._thread is not None:
            # The thread must not return from a store call after the interpreter's shutdown.
            self._thread.join(_STORE_SECONDS)
        if self._store_lost:
            return
        patience = _STORE_GRACE_SECONDS if keeps_store else 0.0
        with suppress(RuntimeError, TimeoutError):
            call_with_timeout(
                lambda: self._announce_leave(collectives, patience), patience + _STORE_SECONDS
            )

    def _failure_reason(self, dependencies: Dependencies, waited: float) -> str:
        timeout = dependencies.timeout.total_seconds()
        timeout = timeout if timeout > 0 else self.timeout
        if waited >= timeout:
            return f"is not done after {waited:.1f} s (timeout {timeout:g} s)"
        if self._peer_failed:
            return "was given up by another rank"
        ranks = dependencies.ranks or self._others
        missing = [self._is_missing(rank, dependencies.seq) for rank in ranks]
        if missing and (all(missing) if dependencies.ranks is None else any(missing)):
            return "lost a rank"
        return ""

    def _is_missing(self, rank: int, seq: int) -> bool:
        if rank not in self._left:
            return rank in self._ended
        discovered, collectives = self._left[rank]
        if seq:
            return collectives < seq
        return time.monotonic() - discovered > _GRACE_SECONDS

    @cached_property
    def _store(self) -> dist.Store:
        store: dist.Store = self._parent_store.clone()  # type: ignore[attr-defined]  # not in stub
        return store

    def _run(self) -> None:
        while not (self._closing.is_set() or self.failure or self._is_idle()):
            self._ended = {rank for rank in self._others if self._peers[rank].has_ended()}
            if not self._store_lost:
                try:
                    self._read_store()
                except RuntimeError:
                    self._store_lost = True  # its process may have exited, which is no error
            self._closing.wait(_POLL_SECONDS)

    def _is_idle(self) -> bool:
        return time.monotonic() - self._last_check > _IDLE_SECONDS

    def _read_store(self) -> None:
        self._peer_failed = self._store.check(["failed"])
        for rank in self._others:
            if rank not in self._left and self._store.check([f"left/{rank}"]):
                collectives = int(self._store.get(f"left/{rank}"))
                self._left[rank] = time.monotonic(), collectives

    def _announce_leave(self, collectives: int, patience: float) -> None:
        # On the existing connection if possible: a new one costs a DNS lookup.
        store = self._parent_store if self._thread is None else self._store
        store.set(f"left/{self._rank}", str(collectives))
        deadline = time.monotonic() + patience
        everyone = [f"left/{rank}" for rank in self._others]
        while time.monotonic() < deadline and not store.check(everyone):
            if any(self._peers[rank].has_ended() for rank in self._others):
                return
            time.sleep(0.01)

    def _exchange_reports(
        self, operation: object, reports: dict[int, str], patience: float
    ) -> None:
        self._store.set(f"in/{self._rank}", str(operation))
        self._store.set("failed", "")
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            for rank in self._without_report(reports):
                if self._store.check([f"in/{rank}"]):
                    reports[rank] = self._store.get(f"in/{rank}").decode()
            if all(self._peers[rank].has_ended() for rank in self._without_report(reports)):
                return
            time.sleep(0.05)

    def _without_report(self, reports: Iterable[int]) -> list[int]:
        return [rank for rank in self._others if rank not in reports]

    def _state(self, rank: int, reports: dict[int, str]) -> str:
        peer = self._peers[rank]
        process = f"process {peer.pid} on {peer.host}"
        if rank in self._left:
            return f"has left the group ({process})"
        if peer.has_ended():
            return f"has ended ({process})"
        if rank in reports:
            return f"is in {reports[rank]}"
        return f"has not reached this operation ({process}); find out where it is instead"

    def _name(self, rank: int) -> str:
        world_rank = self._peers[rank].world_rank
        return f"rank {rank}" if world_rank == rank else f"rank {rank} (global {world_rank})"
