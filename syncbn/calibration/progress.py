"""A progress bar for people, and nothing for programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    first: bool, wanted: bool | None, title: str
) -> Iterator[Callable[[int, int], None]]:
    """Show on stderr how far the body is, and when it may be done.

    Args:
        first: whether this is the rank that shows it.
        wanted: show it; None: if stderr is a terminal.
        title: left of the bar.

    Yields:
        A function to call with how much is done and how much there is.
    """
    if not (first and (sys.stderr.isatty() if wanted is None else wanted)):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        Elapsed(),
        TextColumn("left"),
        Remaining(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
