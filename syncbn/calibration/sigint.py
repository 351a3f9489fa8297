"""Ctrl-C deferred to the end of a step that must not stop half-way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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
