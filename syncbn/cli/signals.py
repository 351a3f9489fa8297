"""SIGTERM and SIGHUP deferred while a command writes a file."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NAMES = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP


@contextmanager
def deferred_termination() -> Iterator[None]:
    """Complete the body before SIGTERM or SIGHUP ends the process, with no temporary file left.

    Signals that the process ignores (``nohup``) or handles are unchanged. An exception instead of
    the deferral would discard the result of the command, and pass through torch's C++ writer. A
    handler for the whole command would keep a rank alive that waits in a collective, since Python
    runs handlers only between its instructions. SIGKILL cannot be deferred.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)

    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    deferred = [n for n in numbers if signal.getsignal(n) is signal.SIG_DFL]
    for number in deferred:
        signal.signal(number, record)
    try:
        yield
    finally:
        for number in deferred:
            signal.signal(number, signal.SIG_DFL)
        for number in received:
            os.kill(os.getpid(), number)
