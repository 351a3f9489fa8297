"""Operations under way: requests that are polled, because a wait inside MPI cannot be ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.distributed.mpi_library import MPI
from syncbn.distributed.mpi_progress import Progress, pause
from syncbn.distributed.mpi_watch import Need, Watch

# Requests of a wait are tested this often in a row: for some twenty microseconds, after which ranks
# that come together are done with all but large messages.
_TESTS_IN_A_ROW = 128
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


def are_over(transfers: Iterable[Transfer]) -> bool:
    """Return whether requests with nothing left to do after them are over, after a short look."""
    for transfer in transfers:
        if transfer.finish is not None:
            return False
        for _ in range(_TESTS_IN_A_ROW):
            if transfer.request.Test():
                break
        else:
            return False
    return True


class MPIWork(dist.Work):
    """An operation that has been started.

    Whoever needs it polls: the caller of :meth:`wait`, and the group's progress thread where
    nobody may be waiting.

    Args:
        name: what is done, for messages.
        transfers: its requests.
        results: the tensors that it fills.
        need: what it needs of other ranks.
        progress: polls it in the background.
        watch: ends hopeless waits.
    """

    def __init__(
        self,
        name: str,
        transfers: list[Transfer],
        results: list[Tensor],
        need: Need,
        progress: Progress,
        watch: Watch,
    ) -> None:
        super().__init__()
        self.started = time.perf_counter()
        self._name = name
        self._transfers = transfers
        self._results = results
        self._need = need
        self._progress = progress
        self._watch = watch
        self._lock = threading.Lock()
        self._pending = True
        self._delivered = 0
        self._error: RuntimeError | None = None
        self._future: torch.futures.Future[list[Tensor]] | None = None
        # Results are put into CUDA tensors in the order of the stream that asked for them.
        on_cuda = bool(results) and results[0].is_cuda
        self._stream = torch.cuda.current_stream(results[0].device) if on_cuda else None

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
            RuntimeError: MPI failed, a rank is gone, or the time is over.
        """
        begun = time.perf_counter()
        try:
            while not self.advance(_TESTS_IN_A_ROW, begun):
                waited = time.perf_counter() - begun
                if timeout and waited > timeout.total_seconds():
                    raise RuntimeError(f"{self} is not done after a wait of {waited:.1f} s")
                pause(waited)
        except BaseException:
            self._progress.add(self)  # MPI still writes to the memory that this object holds
            raise
        if self._error is not None:
            self._watch.has_told = True
            raise self._error
        return True

    def advance(self, tests: int = 1, begun: float | None = None) -> bool:
        """Poll; return whether the operation is over, well or not.

        Args:
            tests: how often to test each request before coming back.
            begun: when the caller began to wait for it; None if it does not.
        """
        if not self._pending:
            return True
        if not self._lock.acquire(blocking=False):
            return False  # another thread polls
        try:
            if self._pending:
                self._pending = not self._poll(tests, begun)
            if self._pending:
                return False
            future, self._future = self._future, None
        finally:
            self._lock.release()
        self._progress.forget(self)
        if future is not None:
            self._fulfil(future)  # runs callbacks of others, who may come back here
        return True

    @property
    def is_over(self) -> bool:
        """Whether a poll has found the operation over."""
        return not self._pending

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
        with self._lock:
            pending = self._pending
            if pending and self._future is None:
                self._future = _ResultsFuture(self)
            future = self._future
        if pending:
            assert future is not None
            self._progress.add(self)
            return future
        over: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self._fulfil(over)
        return over

    def _poll(self, tests: int, begun: float | None) -> bool:
        try:
            for transfer in self._transfers:
                for _ in range(tests):
                    if transfer.request.Test(transfer.status):
                        break
                else:
                    self._doubt(begun)
                    return False
            self._deliver()
        except MPI.Exception as error:
            reason = f"failed: {error.Get_error_string()}"
            self._error = RuntimeError(self._watch.fail(self, reason))
        except RuntimeError as error:
            self._error = error
        except Exception as error:  # or the thread that polls would end, and nobody know
            self._error = RuntimeError(f"{self}: {error!r}")
        if self._error is not None:
            self._progress.abandon(self)
        return True

    def _doubt(self, begun: float | None) -> None:
        # Time runs for a collective from its start, since all ranks should have come to it, and for
        # a message from when somebody waits for it.
        since = self.started if self._need.number else begun
        if since is None:
            return
        waited = time.perf_counter() - since
        if waited > _SECONDS_BEFORE_DOUBT:
            self._watch.look(self, self._need, waited)

    def _deliver(self) -> None:
        if self._stream is None:
            self._finish()
        else:
            with torch.cuda.stream(self._stream):
                self._finish()
            self._stream.synchronize()

    def _finish(self) -> None:
        # Counted, for an interrupt not to make this deliver (divide, say) twice.
        while self._delivered < len(self._transfers):
            finish = self._transfers[self._delivered].finish
            self._delivered += 1
            if finish is not None:
                finish()

    def _fulfil(self, future: torch.futures.Future[list[Tensor]]) -> None:
        if self._error is None:
            future.set_result(self._results)
        else:
            self._watch.has_told = True
            failed = _FutureError(str(self._error))
            future.set_exception(failed)  # type: ignore[arg-type]  # the stub is wrong


class _FutureError(RuntimeError):
    """An error as the value of a future, which is how torch keeps one that Python sets.

    DDP's C++ looks for tensors in any value, by pickling it, and takes the first: of none, which is
    a crash. So this one is raised by whoever pickles it.
    """

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise self


class _ResultsFuture(torch.futures.Future[list[Tensor]]):
    """A future whose waiter polls: a callback that waits for it may be on the progress thread."""

    def __init__(self, work: MPIWork) -> None:
        super().__init__()
        self._work = work

    def wait(self) -> list[Tensor]:
        self._work.wait()
        return super().wait()
