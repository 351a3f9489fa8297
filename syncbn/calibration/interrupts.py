"""Ctrl-C, held back where it would leave things half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Held:
    """A handler of SIGINT that only remembers.

    Args:
        handler: the one before it; None if there is none to call.
    """

    def __init__(self, handler: Any = None) -> None:
        self.seen: tuple[Any, ...] | None = None
        self._handler = handler

    def __call__(self, *what: Any) -> None:
        """Remember a signal."""
        self.seen = what

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Let a signal interrupt the body, also one that came before it."""
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
        """Call the handler before with a signal that has come."""
        seen, self.seen = self.seen, None
        if seen is not None:
            self._handler(*seen)


@contextmanager
def uninterrupted(undo: Callable[[], None] = lambda: None) -> Iterator[Held]:
    """Put off Ctrl-C to the end of the body.

    Args:
        undo: called before an interruption that has been put off.

    Yields:
        What can let it through.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield Held()
        return
    held = Held(before)
    signal.signal(signal.SIGINT, held)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)
        if held.seen is not None:
            undo()
            held.deliver()
