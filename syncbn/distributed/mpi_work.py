"""Operations under way: requests that are polled, because a wait inside MPI cannot be ended."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.distributed.mpi_library import MPI
from syncbn.distributed.mpi_watch import Watch

# Requests of a wait are tested this often in a row: ranks that come together are done by then, some
# ten microseconds later.
_TESTS_IN_A_ROW = 32
_SECONDS_BEFORE_SLEEPING = 1e-3
# A look comes late by at most this part of the wait; sleeping longer would save nothing.
_LATENESS = 0.05
_LONGEST_SLEEP = 1e-3
_SECONDS_BEFORE_DOUBT = 1.0


class Transfer(NamedTuple):
    """One MPI request and what belongs to it.

    Attributes:
        request: as MPI returned it.
        memory: what MPI reads and writes; must live as long as the request.
        finish: puts the result where it belongs; None if MPI wrote it there.
        status: where MPI says whose message a receive took.
    """

    request: MPI.Request
    memory: tuple[Tensor, ...]
    finish: Callable[[], None] | None = None
    status: MPI.Status | None = None


class MPIWork(dist.Work):
    """An operation that has been started.

    Whoever needs it polls: the caller of :meth:`wait`, and the group's progress thread where
    nobody may be waiting.

    Args:
        name: what is done, for messages.
        transfers: its requests.
        results: the tensors that it fills.
        progress: polls it in the background.
        watch: ends hopeless waits.
        timeout: seconds; None for the group's.
        peer: the only rank that is needed; None for all.
    """

    def __init__(
        self,
        name: str,
        transfers: Sequence[Transfer],
        results: list[Tensor],
        progress: Progress,
        watch: Watch,
        timeout: float | None = None,
        peer: int | None = None,
    ) -> None:
        super().__init__()
        self.started = time.perf_counter()
        self._name = name
        self._transfers = transfers
        self._results = results
        self._progress = progress
        self._watch = watch
        self._timeout = timeout
        self._peer = peer
        self._lock = threading.Lock()
        self._pending = True
        self._error: RuntimeError | None = None
        self._futures: list[torch.futures.Future[list[Tensor]]] = []

    def __str__(self) -> str:
        numbers = sum(tensor.numel() for tensor in self._results)
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in self._results}
        return f"{self._name} ({numbers} {'/'.join(sorted(dtypes)) or 'numbers'})"

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Poll until the operation is done.

        Args:
            timeout: how long to wait; zero for the group's timeout. After a shorter time the
                operation goes on.

        Returns:
            True.

        Raises:
            RuntimeError: MPI failed, a rank has ended, or the time is over.
        """
        try:
            while not self.advance(_TESTS_IN_A_ROW):
                waited = time.perf_counter() - self.started
                if timeout and waited > timeout.total_seconds():
                    raise RuntimeError(f"{self} is not done after {waited:.1f} s")
                _pause(waited)
        except BaseException:
            self._progress.add(self)  # MPI still writes to the memory that this object holds
            raise
        if self._error is not None:
            raise self._error
        return True

    def advance(self, tests: int = 1) -> bool:
        """Poll; return whether the operation is over, well or not.

        Args:
            tests: how often to test each request before coming back.
        """
        if not self._pending:
            return True
        if not self._lock.acquire(blocking=False):
            return False  # another thread polls
        try:
            if self._pending:
                self._pending = not self._poll(tests)
            if self._pending:
                return False
            futures, self._futures = self._futures, []
        finally:
            self._lock.release()
        for future in futures:
            self._fulfil(future)  # runs callbacks of others, who may come back here
        return True

    def is_completed(self) -> bool:
        """Return whether the operation is over."""
        return self.advance()

    def is_success(self) -> bool:
        """Return whether the operation is over and went well."""
        return self.advance() and self._error is None

    def exception(self) -> RuntimeError | None:
        """Return why the operation failed; None while it has not."""
        return self._error

    def result(self) -> list[Tensor]:
        """Return the tensors that the operation fills."""
        return self._results

    def synchronize(self) -> None:
        """Wait: a result is in place when the operation is done, no stream has to."""
        self.wait()

    def source_rank(self) -> int:
        """Return the rank in the group whose message this receive took."""
        status = self._transfers[0].status
        return MPI.ANY_SOURCE if status is None else status.Get_source()

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """Return a future of the results; it is fulfilled without anyone waiting."""
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        with self._lock:
            pending = self._pending
            if pending:
                self._futures.append(future)
        if pending:
            self._progress.add(self)
        else:
            self._fulfil(future)
        return future

    def _poll(self, tests: int) -> bool:
        try:
            for transfer in self._transfers:
                for _ in range(tests):
                    if transfer.request.Test(transfer.status):
                        break
                else:
                    waited = time.perf_counter() - self.started
                    if waited > _SECONDS_BEFORE_DOUBT:
                        self._watch.look(self, waited, self._timeout, self._peer)
                    return False
            for transfer in self._transfers:
                if transfer.finish is not None:
                    transfer.finish()
        except MPI.Exception as error:
            self._error = RuntimeError(
                self._watch.fail(self, f"failed: {error.Get_error_string()}")
            )
        except RuntimeError as error:
            self._error = error
        if self._error is not None:
            self._progress.abandon(self)
        return True

    def _fulfil(self, future: torch.futures.Future[list[Tensor]]) -> None:
        if self._error is None:
            future.set_result(self._results)
        else:
            future.set_exception(self._error)  # type: ignore[arg-type]  # the stub is wrong


class Progress:
    """The thread of a group that polls what was started asynchronously, so that futures come true.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._works: list[MPIWork] = []
        self._abandoned: list[object] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def add(self, work: MPIWork) -> None:
        """Poll an operation until it is over."""
        with self._changed:
            if work in self._works:
                return
            self._works.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def abandon(self, owner: object) -> None:
        """Keep the memory of an operation that failed alive: MPI may write there for ever."""
        self._abandoned.append(owner)

    def close(self) -> None:
        """Finish what is under way, then end the thread.

        Raises:
            RuntimeError: an operation failed that nobody has waited for.
        """
        with self._changed:
            works = list(self._works)
        try:
            for work in works:
                work.wait()
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify()
            if self._thread is not None:
                self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._works or self._closing)
                if self._closing:
                    return
                works = list(self._works)
            over = [work for work in works if work.advance()]
            if over:
                with self._changed:
                    self._works = [work for work in self._works if work not in over]
            else:
                _pause(time.perf_counter() - works[-1].started)


def _pause(waited: float) -> None:
    # Yielding lets another rank of a crowded machine, or another thread, do what is waited for.
    if waited < _SECONDS_BEFORE_SLEEPING:
        os.sched_yield()
    else:
        time.sleep(min(_LATENESS * waited, _LONGEST_SLEEP))
