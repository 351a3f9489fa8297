"""A calibration report as a picture: how far the old statistics are off, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from syncbn.files import atomic_write

if TYPE_CHECKING:
    from syncbn.calibration.report import CalibrationReport

_BAND = (0.05, 0.25, 0.5, 0.75, 0.95)
_BLUE, _GREY, _RED = "#2b6cb0", "#8a8f98", "#c53030"
_MOST_NAMES = 40


def draw(report: CalibrationReport, path: Path) -> None:
    """Write a PNG; the file is there whole or not at all.

    Args:
        report: what to draw.
        path: of the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("report.plot needs matplotlib: pip install matplotlib") from error
    layers = report.layers
    width = min(max(6.5, 0.34 * len(layers) + 2), 16)
    figure = Figure(figsize=(width, 7.2), dpi=130, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    channels = [layer.channels for layer in layers]
    # The old statistic as seen from the new one, which is the zero line.
    _panel(top, [-c.shift() for c in channels], [layer.mean_error for layer in layers])
    top.set_ylabel("old mean - new mean\n(new standard deviations)")
    _panel(bottom, [-c.log_ratio() for c in channels], [layer.var_error for layer in layers])
    bottom.set_ylabel("ln(old variance / new variance)")
    top.set_title("Running statistics before recalibration, from those after it", loc="left")
    bottom.set_xlabel("batch-norm layers, from input to output")
    bottom.set_xticks(range(len(layers)))
    names = [layer.name if len(layers) <= _MOST_NAMES else "" for layer in layers]
    bottom.set_xticklabels(names, rotation=60, ha="right", fontsize=8)
    handles, labels = top.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=8, ncols=3)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _panel(axes: Any, values: list[Tensor], errors: list[float]) -> None:
    places = range(len(values))
    levels = values[0].new_tensor(_BAND)
    low, first, middle, third, high = torch.stack(
        [v.nan_to_num(0.0).quantile(levels) for v in values], 1
    ).tolist()
    axes.vlines(places, low, high, color=_BLUE, linewidth=1.5, alpha=0.5, label="5 to 95 %")
    axes.vlines(places, first, third, color=_BLUE, linewidth=5, label="middle half of the channels")
    axes.plot(places, middle, "o", color="white", markersize=2.5)
    edges = [place + side for place in places for side in (-0.5, 0.5)]
    band = [2 * error for error in errors for _ in range(2)]
    axes.fill_between(
        edges,
        [-error for error in band],
        band,
        color=_RED,
        alpha=0.18,
        linewidth=0,
        label="new statistics ± 2 standard errors",
    )
    axes.axhline(0.0, color=_GREY, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
