"""The background of a group: a thread that polls what was started asynchronously."""

from __future__ import annotations

import os
import threading
import time
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from syncbn.distributed.mpi_work import MPIWork

_SECONDS_BEFORE_SLEEPING = 1e-3
# Not everywhere: macOS has none.
_yield = getattr(os, "sched_yield", lambda: time.sleep(0))
# A look comes late by at most this part of the wait; sleeping longer would save nothing.
_LATENESS = 0.05
_LONGEST_SLEEP = 1e-3
_NAP = 2e-3
# Of many operations under way, so many are polled before the thread looks for new ones.
_AT_A_TIME = 32


class Progress:
    """Polls operations in a thread, so that futures come true while nobody waits.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._works: dict[int, MPIWork] = {}
        self._abandoned: list[object] = []
        self._changed = threading.Condition()
        self._nap: float | None = None  # seconds until the thread looks by itself
        self._thread: threading.Thread | None = None

    def add(self, work: MPIWork, soon: bool = True) -> None:
        """Poll an operation until it is over; until then its memory lives.

        Args:
            work: the operation.
            soon: wake the thread now; else it has a look after some milliseconds, since waking it
                would delay a caller who waits for the operation next.
        """
        with self._changed:
            self._works.setdefault(id(work), work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            if soon:
                self._changed.notify()
            else:
                self._nap = _NAP

    def forget(self, work: MPIWork) -> None:
        """Poll an operation no more: it is over."""
        # Not without the lock: the thread has looked whether there is any.
        with self._changed:
            self._works.pop(id(work), None)

    def abandon(self, owner: object) -> None:
        """Keep the memory of an operation that failed alive: MPI may write there forever."""
        self._abandoned.append(owner)

    def close(self) -> None:
        """Finish what is under way, then end the thread.

        Raises:
            RuntimeError: an operation failed.
        """
        with self._changed:
            works = list(self._works.values())
        try:
            for work in works:
                work.wait()
        finally:
            with self._changed:
                thread, self._thread = self._thread, None
                self._changed.notify()
            if thread is not None and thread is not threading.current_thread():
                thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._works and self._thread is not None:
                    self._changed.wait(self._nap)
                if self._thread is None:
                    return
                works = list(islice(self._works.values(), _AT_A_TIME))
            over = [work for work in works if work.advance()]
            with self._changed:
                for work in works:  # to the end of the line
                    if self._works.pop(id(work), None) is not None and not work.is_over:
                        self._works[id(work)] = work
            if not over:
                pause(time.perf_counter() - max(work.started for work in works))


def pause(waited: float) -> None:
    """Wait a little before the next poll, so that others get the core.

    Args:
        waited: seconds so far.
    """
    if waited < _SECONDS_BEFORE_SLEEPING:
        _yield()
    else:
        time.sleep(min(_LATENESS * waited, _LONGEST_SLEEP))
