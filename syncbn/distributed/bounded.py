"""Calls that cannot be interrupted, given up after a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def bounded(function: Callable[[], Result], seconds: float) -> Result:
    """Return what a function returns; it runs in a thread, which is left behind if it takes longer.

    For calls into C that wait for other processes and let Python's other threads run meanwhile.

    Args:
        function: is called once.
        seconds: to wait for it.

    Raises:
        TimeoutError: it has not returned in time.
        Exception: what the function raised.
    """
    results: list[Result] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"not done after {seconds:g} s")
    return results[0]
