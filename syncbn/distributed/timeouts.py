"""Calls with a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def call_with_timeout(function: Callable[[], Result], seconds: float) -> Result:
    """Return the result of a function that cannot be interrupted, or give up after a time.

    The function runs in a thread, which is left behind on a timeout. For C functions that wait for
    other processes and release the GIL.

    Args:
        function: called once.
        seconds: time limit.

    Raises:
        TimeoutError: the function has not returned in time.
        Exception: the exception raised by the function.
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
