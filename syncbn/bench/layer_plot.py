"""Bar charts of the bandwidth of layers and of a copy."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from syncbn.bench.layer_times import CaseCosts
from syncbn.files import atomic_write

_COLORS = ("#9ca3af", "#1d4ed8", "#60a5fa", "#d97706", "#fbbf24", "#059669")
_COPY_COLOR = "#111827"
# Reads and writes of the tensor, forward and backward, and in a copy.
_PASSES, _COPY_PASSES = 8, 2


def draw(costs: list[CaseCosts], target: Path) -> None:
    """Draw forward and backward of the plain layers as PNG, a chart per layout and dtype."""
    groups = groupby(costs, lambda cost: f"{cost.case.layout}, {cost.case.dtype}")
    charts = [(title, list(cases)) for title, cases in groups]
    # A Figure without pyplot has no global state and needs no display.
    figure = Figure(figsize=(8, 4 * len(charts)), dpi=130, layout="constrained")
    all_axes = figure.subplots(len(charts), squeeze=False)[:, 0]
    for axes, (title, cases) in zip(all_axes, charts, strict=True):
        _draw_chart(axes, cases)
        axes.set_title(f"forward + backward, {title}", loc="left")
    with atomic_write(target) as file:
        figure.savefig(file, format="png")


def _draw_chart(axes: Axes, cases: list[CaseCosts]) -> None:
    plain = [i for i, layer in enumerate(cases[0].layers) if not layer.epilogue]
    width = 0.8 / len(plain)
    for number, (i, color) in enumerate(zip(plain, _COLORS, strict=False)):
        left = [x - 0.4 + (number + 0.5) * width for x in range(len(cases))]
        times = [case.layers[i].step.median for case in cases]
        rates = [_PASSES * c.case.nbytes / t / 1e9 for c, t in zip(cases, times, strict=True)]
        axes.bar(left, rates, width, label=cases[0].layers[i].title, color=color)
    for x, case in enumerate(cases):
        rate = _COPY_PASSES * case.case.nbytes / case.copy.median / 1e9
        axes.hlines(rate, x - 0.45, x + 0.45, _COPY_COLOR, label="copy" if x == 0 else "_")
    axes.set_xticks(range(len(cases)), [case.case.shape for case in cases], rotation=20)
    axes.set_ylabel("GB/s that must be moved")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
