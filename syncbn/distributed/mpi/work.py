"""Operations in flight, polled: a blocking MPI wait could not be ended after a peer's death."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.distributed.mpi import MPI, backoff
from syncbn.distributed.mpi.buffers import SPIN_TESTS, PendingRequest
from syncbn.distributed.mpi.watchdog import Dependencies, Watchdog

_SECONDS_BEFORE_CHECK = 1.0
# Delay before the progress thread polls work that was added without a wake-up.
_LAZY_SECONDS = 2e-3
# Operations polled per pass, before the thread looks for new ones.
_BATCH = 32


@dataclass(eq=False)
class MPIWork(dist.Work):
    """An operation in flight, polled by callers of :meth:`wait` and by the progress thread.

    Attributes:
        name: name of the operation, for messages.
        requests: MPI requests of the operation.
        results: tensors to fill.
        dependencies: ranks that the operation depends on.
        progress: progress thread of the group.
        watchdog: watchdog of the group.
    """

    name: str
    requests: list[PendingRequest]
    results: list[Tensor]
    dependencies: Dependencies
    progress: ProgressThread
    watchdog: Watchdog

    def __post_init__(self) -> None:
        super().__init__()
        self.started = time.perf_counter()
        self.completed = False
        self._lock = threading.Lock()
        self._copied = 0
        self._error: RuntimeError | None = None
        self._future: torch.futures.Future[list[Tensor]] | None = None
        # Results are copied to CUDA tensors in the stream that was current at the call.
        on_cuda = bool(self.results) and self.results[0].is_cuda
        self._stream = torch.cuda.current_stream(self.results[0].device) if on_cuda else None

    def __str__(self) -> str:
        numel = sum(tensor.numel() for tensor in self.results)
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in self.results}
        return f"{self.name} ({numel} {'/'.join(sorted(dtypes)) or 'elements'})"

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Poll until the operation is complete; return True.

        Args:
            timeout: time limit; zero for the group's timeout. The operation continues after a
                shorter limit.

        Raises:
            RuntimeError: MPI failed, a rank has ended, or a timeout.
        """
        wait_start = time.perf_counter()
        try:
            while not self.advance(SPIN_TESTS, wait_start):
                waited = time.perf_counter() - wait_start
                if timeout and waited > timeout.total_seconds():
                    raise RuntimeError(f"{self} is not done after a wait of {waited:.1f} s")
                backoff(waited)
        except BaseException:
            self.progress.add(self)  # keeps the memory alive: MPI still writes to it
            raise
        if self._error is not None:
            self.watchdog.error_reported = True
            raise self._error
        return True

    def advance(self, tests: int = 1, wait_start: float | None = None) -> bool:
        """Poll; return whether the operation has ended, with or without an error.

        Args:
            tests: maximal number of tests per request.
            wait_start: start time of the caller's wait; None outside a wait.
        """
        if self.completed:
            return True
        if not self._lock.acquire(blocking=False):
            return False  # another thread polls
        try:
            self.completed = self.completed or self._poll(tests, wait_start)
            if not self.completed:
                return False
            future, self._future = self._future, None
        finally:
            self._lock.release()
        self.progress.remove(self)
        if future is not None:
            self._complete_future(future)  # without the lock: callbacks may call this method
        return True

    def is_completed(self) -> bool:
        """Return whether the operation has ended."""
        return self.advance()

    def is_success(self) -> bool:
        """Return whether the operation has ended without an error."""
        return self.advance() and self._error is None

    def exception(self) -> RuntimeError | None:
        """Return the error of the operation; None while it has not failed."""
        return self._error

    def result(self) -> list[Tensor]:
        """Return the tensors to fill."""
        return self.results

    def synchronize(self) -> None:
        """Wait for the results, which need no further synchronization of streams."""
        self.wait()

    def source_rank(self) -> int:
        """Return the source of a receive, as rank in the group."""
        status = self.requests[0].status
        return MPI.ANY_SOURCE if status is None else status.Get_source()

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """Return a future of the results, completed by the progress thread."""
        with self._lock:
            if not self.completed:
                self._future = self._future or _ResultsFuture(self)
            future = self._future
        if future is not None:
            self.progress.add(self)
            return future
        done: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self._complete_future(done)
        return done

    def _poll(self, tests: int, wait_start: float | None) -> bool:
        try:
            for pending in self.requests:
                for _ in range(tests):
                    if pending.request.Test(pending.status):
                        break
                else:
                    self._check_stalled(wait_start)
                    return False
            self._copy_out()
        except MPI.Exception as error:
            reason = f"failed: {error.Get_error_string()}"
            self._error = RuntimeError(self.watchdog.fail(self, reason))
        except RuntimeError as error:
            self._error = error
        except Exception as error:  # otherwise the progress thread would end silently
            self._error = RuntimeError(f"{self}: {error!r}")
        if self._error is not None:
            self.progress.keep_alive(self)
        return True

    def _check_stalled(self, wait_start: float | None) -> None:
        # A collective is timed from its start, since all ranks should reach it; point-to-point
        # communication from the start of a wait.
        since = self.started if self.dependencies.seq else wait_start
        if since is None:
            return
        waited = time.perf_counter() - since
        if waited > _SECONDS_BEFORE_CHECK:
            self.watchdog.check(self, self.dependencies, waited)

    def _copy_out(self) -> None:
        if self._stream is None:
            return self._finish()
        with torch.cuda.stream(self._stream):
            self._finish()
        return self._stream.synchronize()

    def _finish(self) -> None:
        # Counted, so that an interrupt cannot repeat a step (a division, for example).
        while self._copied < len(self.requests):
            finish = self.requests[self._copied].finish
            self._copied += 1
            if finish is not None:
                finish()

    def _complete_future(self, future: torch.futures.Future[list[Tensor]]) -> None:
        if self._error is None:
            future.set_result(self.results)
        else:
            self.watchdog.error_reported = True
            failed = _FutureError(str(self._error))
            future.set_exception(failed)  # type: ignore[arg-type]  # the stub is wrong


class _FutureError(RuntimeError):
    """An exception of a future that cannot be pickled.

    torch stores a Python exception as the future's value; DDP pickles it looking for tensors and
    crashes on an empty list. Raising from ``__reduce_ex__`` avoids that.
    """

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise self


class _ResultsFuture(torch.futures.Future[list[Tensor]]):
    """A future whose wait polls, since a callback may wait for it on the progress thread."""

    def __init__(self, work: MPIWork) -> None:
        super().__init__()
        self._work = work

    def wait(self) -> list[Tensor]:
        self._work.wait()
        return super().wait()


class ProgressThread:
    """Polls asynchronous operations, so that futures complete without a waiting caller."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._works: dict[int, MPIWork] = {}
        self._kept_alive: list[object] = []
        self._changed = threading.Condition()
        self._timeout: float | None = None  # seconds until the next pass without a wake-up
        self._thread: threading.Thread | None = None

    def add(self, work: MPIWork, wake: bool = True) -> None:
        """Poll an operation, and keep its memory alive, until it has ended.

        With ``wake=False`` the thread starts to poll some milliseconds later, since a wake-up would
        delay a caller that waits for the operation next.
        """
        with self._changed:
            self._works.setdefault(id(work), work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            if wake:
                self._changed.notify()
            else:
                self._timeout = _LAZY_SECONDS

    def remove(self, work: MPIWork) -> None:
        """Stop polling an operation that has ended."""
        # With the lock: the thread tests whether any operations are left.
        with self._changed:
            self._works.pop(id(work), None)

    def keep_alive(self, owner: object) -> None:
        """Keep the memory of a failed operation alive, since MPI may write to it at any time."""
        self._kept_alive.append(owner)

    def close(self) -> None:
        """Complete the operations in flight, then end the thread; RuntimeError if one failed."""
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
                    self._changed.wait(self._timeout)
                if self._thread is None:
                    return
                works = list(islice(self._works.values(), _BATCH))
            ended = [work for work in works if work.advance()]
            with self._changed:
                for work in works:  # to the end of the queue
                    if self._works.pop(id(work), None) is not None and not work.completed:
                        self._works[id(work)] = work
            if not ended:
                backoff(time.perf_counter() - max(work.started for work in works))
