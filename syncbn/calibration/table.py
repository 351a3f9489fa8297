"""A calibration report as text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from syncbn.calibration.printable import escape_controls

if TYPE_CHECKING:
    from syncbn.calibration.report import CalibrationReport

_COLUMNS = 100


def render(report: CalibrationReport) -> str:
    """Return a table with a row a layer, notes and the verdict."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer")
    for heading in ("samples", "values", "mean shift", "± error", "var ratio", "± error", "KL"):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        table.add_row(
            escape_controls(layer.name),
            str(layer.samples),
            f"{layer.count:.3g}",
            f"{layer.mean_shift:.3f}",
            f"{layer.mean_error:.3f}",
            f"{layer.var_ratio:.3f}",
            f"{layer.var_error:.3f}",
            f"{layer.kl:.4f}",
        )
    notes = [
        "mean shift: in standard deviations (root mean square over channels); var ratio: new over "
        "old (geometric mean); errors: standard errors of the new ones; KL: nats a channel"
    ]
    if report.not_reached:
        notes.append(f"not reached, unchanged: {', '.join(report.not_reached)}")
    if report.left_alone:
        notes.append(
            "left alone (frozen in evaluation mode, or excluded by layers= or skip=): "
            f"{', '.join(report.left_alone)}"
        )
    if report.verification:
        notes.append(f"verification: {report.verification}")
    return _text(table, *notes, report.verdict())


def render_metrics(before: dict[str, float], after: dict[str, float]) -> str:
    """Return a table of metrics before and after a calibration."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("evaluation")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    for name in before:
        table.add_row(escape_controls(name), f"{before[name]:.4f}", f"{after[name]:.4f}")
    return _text(table)


def _text(*parts: Table | str) -> str:
    text = io.StringIO()
    # Names may contain brackets and colons, which are no markup.
    console = Console(
        file=text, width=_COLUMNS, highlight=False, color_system=None, markup=False, emoji=False
    )
    for part in parts:
        console.print(escape_controls(part) if isinstance(part, str) else part)
    return text.getvalue()
