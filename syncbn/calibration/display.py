"""Tables, pictures and progress bars; rich and matplotlib are imported on use."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.files import atomic_write

_WIDTH = 100
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BLUE, _GREY, _RED = "#2b6cb0", "#8a8f98", "#c53030"
_MAX_TICK_LABELS = 40


def escape_controls(text: str, keep: str = "") -> str:
    r"""Return a text with unprintable characters as escapes, such as ``\x1b``.

    Names in a checkpoint may hold escape sequences, which move the cursor or change the title of
    a terminal, and Unicode controls, which reorder the text that follows.

    Args:
        text: names or messages.
        keep: unprintable characters to keep, such as the newline.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def render_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """Return a table and the notes below it as text, with control characters escaped.

    Args:
        headings: headings of the columns; the first column is aligned to the left.
        rows: cells of each row.
        notes: paragraphs below the table.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(escape_controls, row))
    text = io.StringIO()
    # No markup: names may contain brackets and colons.
    console = Console(
        file=text, width=_WIDTH, highlight=False, color_system=None, markup=False, emoji=False
    )
    for part in (table, *map(escape_controls, notes)):
        console.print(part)
    return text.getvalue()


def render_metrics(before: dict[str, float], after: dict[str, float]) -> str:
    """Return a table of metrics before and after a calibration."""
    rows = [(name, f"{before[name]:.4f}", f"{after[name]:.4f}") for name in before]
    return render_table(("evaluation", "before", "after"), rows)


def draw_drift(
    path: Path,
    names: Sequence[str],
    means: tuple[Sequence[Tensor], Sequence[float]],
    variances: tuple[Sequence[Tensor], Sequence[float]],
) -> None:
    """Write a PNG of the old statistics relative to the new ones; complete or absent.

    Args:
        path: file to write.
        names: names of the layers, from input to output.
        means: shift of the old mean by channel, in new standard deviations, and its standard error,
            for each layer.
        variances: logarithm of old over new variance by channel, and its standard error, for each
            layer.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("report.plot needs matplotlib: pip install matplotlib") from error
    width = min(max(6.5, 0.34 * len(names) + 2), 16)
    figure = Figure(figsize=(width, 7.2), dpi=130, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    _draw_panel(top, *means)
    top.set_ylabel("old mean - new mean\n(new standard deviations)")
    _draw_panel(bottom, *variances)
    bottom.set_ylabel("ln(old variance / new variance)")
    top.set_title("Running statistics before recalibration, relative to those after it", loc="left")
    bottom.set_xlabel("batch-norm layers, from input to output")
    bottom.set_xticks(range(len(names)))
    labels = [name if len(names) <= _MAX_TICK_LABELS else "" for name in names]
    bottom.set_xticklabels(labels, rotation=60, ha="right", fontsize=8)
    handles, labels = top.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=8, ncols=3)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _draw_panel(axes: Any, values: Sequence[Tensor], errors: Sequence[float]) -> None:
    places = range(len(values))
    levels = values[0].new_tensor(_QUANTILES)
    low, first, middle, third, high = torch.stack(
        [v.nan_to_num(0.0).quantile(levels) for v in values], 1
    ).tolist()
    axes.vlines(places, low, high, color=_BLUE, linewidth=1.5, alpha=0.5, label="5 to 95 %")
    axes.vlines(places, first, third, color=_BLUE, linewidth=5, label="middle half of the channels")
    axes.plot(places, middle, "o", color="white", markersize=2.5)
    edges = [place + side for place in places for side in (-0.5, 0.5)]
    band = [2 * error for error in errors for _ in range(2)]
    label = "new statistics ± 2 standard errors"
    axes.fill_between(
        edges, [-e for e in band], band, color=_RED, alpha=0.18, linewidth=0, label=label
    )
    axes.axhline(0.0, color=_GREY, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


@contextmanager
def progress_bar(enabled: bool | None, title: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of the body on stderr, with the estimated time left.

    Args:
        enabled: True for a bar; None for a bar if stderr is a terminal.
        title: text left of the bar.

    Yields:
        A function of the finished and the total number of work units.
    """
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (BarColumn(), MofNCompleteColumn(), Elapsed(), TextColumn("left"), Remaining())
    with Progress(TextColumn(title), *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
