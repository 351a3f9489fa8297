"""What the benchmark of layers found, as a picture: bandwidths under that of a copy."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from syncbn.bench.kernel_times import TRAFFIC, KernelCost
from syncbn.bench.layer_cases import NOTHING
from syncbn.bench.layer_tables import title
from syncbn.bench.layer_times import CaseCosts
from syncbn.files import atomic_write

_COLORS = ("#9ca3af", "#1d4ed8", "#60a5fa", "#d97706", "#fbbf24", "#059669")
_ROOF = "#111827"


def draw(layers: list[CaseCosts], functions: list[KernelCost], target: Path) -> None:
    """Draw a row for each layout and dtype: its layers, and its first kernel's functions.

    Args:
        layers: what layers cost.
        functions: what functions cost.
        target: the PNG to write.
    """
    rows = [(name, list(group)) for name, group in groupby(layers, _layout)]
    # A Figure without pyplot has no global state and needs no display.
    figure = Figure(figsize=(15, 4 * len(rows)), dpi=130, layout="constrained")
    for axes, ((layout, dtype), cases) in zip(
        figure.subplots(len(rows), 2, squeeze=False), rows, strict=True
    ):
        _draw_layers(axes[0], cases)
        axes[0].set_title(f"forward + backward, {layout}, {dtype}", loc="left")
        kernel = functions[0].kernel
        costs = [c for c in functions if _layout(c) == (layout, dtype) and c.kernel == kernel]
        _draw_functions(axes[1], [c for c in costs if c.after == NOTHING])
        axes[1].set_title(f"functions of kernel {kernel}, {layout}, {dtype}", loc="left")
    with atomic_write(target) as file:
        figure.savefig(file, format="png")


def _layout(cost: CaseCosts | KernelCost) -> tuple[str, str]:
    return cost.case.layout, cost.case.dtype


def _draw_layers(axes: Axes, cases: list[CaseCosts]) -> None:
    bars = {}
    traffic = sum(TRAFFIC.values())
    for i, layer in enumerate(cases[0].layers):
        if layer.after == NOTHING:
            seconds = [case.layers[i].step.median for case in cases]
            bars[title(layer)] = [
                traffic * case.case.nbytes / time for case, time in zip(cases, seconds, strict=True)
            ]
    _draw(
        axes,
        [case.case.shape for case in cases],
        [2 * case.case.nbytes / case.copy.median for case in cases],
        bars,
    )


def _draw_functions(axes: Axes, costs: list[KernelCost]) -> None:
    bars = {
        name: [times * cost.case.nbytes / cost.seconds[name].median for cost in costs]
        for name, times in TRAFFIC.items()
    }
    _draw(
        axes,
        [cost.case.shape for cost in costs],
        [2 * cost.case.nbytes / cost.seconds["copy"].median for cost in costs],
        bars,
    )


def _draw(axes: Axes, names: list[str], roof: list[float], bars: dict[str, list[float]]) -> None:
    width = 0.8 / len(bars)
    for number, ((label, values), color) in enumerate(zip(bars.items(), _COLORS, strict=False)):
        left = [i - 0.4 + (number + 0.5) * width for i in range(len(names))]
        axes.bar(left, [value / 1e9 for value in values], width, label=label, color=color)
    for i, value in enumerate(roof):
        roof_label = "copy" if i == 0 else "_"
        axes.hlines(value / 1e9, i - 0.45, i + 0.45, _ROOF, linewidth=1.5, label=roof_label)
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_ylabel("GB/s that must be moved")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
