"""Ranks of a calibration: every step succeeds on all of them or fails on all, Ctrl-C included."""

from __future__ import annotations

import hashlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.distributed.collectives import all_reduce
from syncbn.distributed.objects import all_gather_objects

T = TypeVar("T")


class DeferredSigint:
    """SIGINT handler that records the signal for later.

    Args:
        handler: previous handler of SIGINT; None if SIGINT is not deferred.
    """

    def __init__(self, handler: Any = None) -> None:
        self.received: tuple[Any, ...] | None = None
        self._handler = handler

    def __call__(self, *arguments: Any) -> None:
        """Record a signal."""
        self.received = arguments

    @contextmanager
    def allow_sigint(self) -> Iterator[None]:
        """Let SIGINT interrupt the body, including a signal recorded earlier."""
        if self._handler is None:
            yield
            return
        try:
            signal.signal(signal.SIGINT, self._handler)
            self.deliver()
            yield
        finally:
            signal.signal(signal.SIGINT, self)

    def deliver(self) -> None:
        """Call the previous handler if a signal was recorded."""
        received, self.received = self.received, None
        if received is not None:
            self._handler(*received)


@contextmanager
def defer_sigint(undo: Callable[[], None] = lambda: None) -> Iterator[DeferredSigint]:
    """Defer Ctrl-C to the end of the body.

    Args:
        undo: function called before a deferred signal is delivered.

    Yields:
        The handler, whose ``allow_sigint`` ends the deferral for a nested block.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield DeferredSigint()
        return
    deferred = DeferredSigint(before)
    signal.signal(signal.SIGINT, deferred)
    try:
        yield deferred
    finally:
        signal.signal(signal.SIGINT, before)
        if deferred.received is not None:
            undo()
            deferred.deliver()


class Ranks:
    """Ranks that calibrate together. All methods are collectives.

    Args:
        group: process group; None for a single rank.
        device: device of the tensors in collectives.
        sigint: deferred Ctrl-C, allowed only while a rank works alone. A rank interrupted within a
            collective would leave the remaining ranks waiting.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        sigint: DeferredSigint | None = None,
    ) -> None:
        self._group = group
        self._device = device
        self._sigint = sigint or DeferredSigint()

    @property
    def rank(self) -> int:
        """Rank of this process, from 0. Not a collective."""
        return 0 if self._group is None else self._group.rank()

    @property
    def size(self) -> int:
        """Number of ranks. Not a collective."""
        return 1 if self._group is None else self._group.size()

    def all_gather_result(
        self, work: Callable[[], T], step: str = "a pass over the data"
    ) -> list[T]:
        """Call a function on every rank and return the results of all ranks.

        Args:
            work: function with a small picklable result.
            step: name of the step in error messages.

        Raises:
            RuntimeError: the function raised on another rank, or a rank cannot be reached.
            BaseException: the function raised on this rank.
        """
        try:
            with self._sigint.allow_sigint():
                result = work()
        except BaseException:
            # An unreachable rank must not hide the error of this one.
            with suppress(RuntimeError):
                self.all_gather_object((False, None), step)
            raise
        results: list[tuple[bool, T]] = self.all_gather_object((True, result), step)
        failed = [f"rank {rank}" for rank, (succeeded, _) in enumerate(results) if not succeeded]
        if failed:
            raise RuntimeError(
                f"calibration was ended by an error on {', '.join(failed)}; see the output there"
            )
        return [result for _, result in results]

    def run_on_all_ranks(self, work: Callable[[], T], step: str = "the preparation") -> T:
        """Call a function with any result on every rank; return the result of this rank.

        Raises:
            RuntimeError: the function raised on another rank, or a rank cannot be reached.
            BaseException: the function raised on this rank.
        """
        results: list[T] = []
        self.all_gather_result(lambda: results.append(work()), step)
        return results[0]

    def require_same(self, lines: list[str]) -> None:
        """Raise on every rank unless all ranks pass the same lines.

        Args:
            lines: facts such as arguments and names of layers. A hash of them is exchanged, and
                the lines themselves only if hashes differ.

        Raises:
            ValueError: the lines differ; the message has the first difference.
        """
        digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest()
        if len(set(self.all_gather_object(digest, "the comparison of arguments and layers"))) == 1:
            return
        first, *rest = self.all_gather_object(lines)
        for rank, theirs in enumerate(rest, 1):
            for pair in zip_longest(first, theirs, fillvalue="no more layers"):
                if pair[0] != pair[1]:
                    raise ValueError(
                        f"the ranks differ: rank 0 has {pair[0]}, but rank {rank} has {pair[1]}; "
                        "expected the same model and arguments on every rank"
                    )

    def ranks_per_device(self) -> int:
        """Return the number of ranks that share the memory of this rank."""
        memory = socket.gethostname()
        if self._device.type == "cuda":
            memory += str(torch.cuda.get_device_properties(self._device).uuid)
        return self.all_gather_object(memory).count(memory)

    def all_gather_object(self, value: T, step: str = "an exchange of results") -> list[T]:
        """Return the values of all ranks, by rank.

        Args:
            value: picklable object.
            step: name of the step in error messages.

        Raises:
            RuntimeError: a rank cannot be reached.
        """
        if self._group is None:
            return [value]
        with self._explained(step):
            return all_gather_objects(value, self._group)

    def all_reduce(self, vector: Tensor, label: str) -> Tensor:
        """Return a float64 vector summed over the ranks, with the same bits on all of them."""
        return all_reduce(vector, self._group, label)

    def broadcast_first(self, vector: Tensor) -> Tensor:
        """Replace a vector by the vector of rank 0, in place."""
        if self._group is not None:
            with self._explained("the broadcast of the old statistics"):
                dist.broadcast(vector, dist.get_global_rank(self._group, 0), group=self._group)
        return vector

    @contextmanager
    def _explained(self, step: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"calibration failed on rank {self.rank} of {self.size} in {step}: a rank has "
                "ended, cannot be reached, or did not arrive in time. Find the first error on the "
                f"other ranks, then restart all ranks ({error})"
            ) from error
