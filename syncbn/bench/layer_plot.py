"""Bar charts of the bandwidth of layers and kernels, under that of a copy."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from syncbn.bench.kernel_times import TRAFFIC, KernelCost
from syncbn.bench.layer_cases import NOTHING
from syncbn.bench.layer_times import CaseCosts
from syncbn.files import replacing

_COLORS = ("#9ca3af", "#1d4ed8", "#60a5fa", "#d97706", "#fbbf24", "#059669")
_COPY_COLOR = "#111827"


def draw(layers: list[CaseCosts], steps: list[KernelCost], target: Path) -> None:
    """Draw a row per layout and dtype: layers, and the steps of the first kernel.

    Args:
        layers: costs of layers.
        steps: costs of kernels.
        target: PNG file.
    """
    rows = [(kind, list(costs)) for kind, costs in groupby(layers, _kind)]
    # A Figure without pyplot has no global state and needs no display.
    figure = Figure(figsize=(15, 4 * len(rows)), dpi=130, layout="constrained")
    for axes, (kind, cases) in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        first, title = steps[0].kernel, ", ".join(kind)
        plain = [i for i, layer in enumerate(cases[0].layers) if layer.epilogue == NOTHING]
        total = sum(TRAFFIC.values())
        bars = {
            cases[0].layers[i].title: [
                total * case.case.nbytes / case.layers[i].step.median for case in cases
            ]
            for i in plain
        }
        copies = [2 * case.case.nbytes / case.copy.median for case in cases]
        names = [case.case.shape for case in cases]
        _draw_bars(axes[0], f"forward + backward, {title}", names, copies, bars)
        costs = [c for c in steps if (_kind(c), c.kernel) == (kind, first)]
        bars = {
            step: [factor * cost.case.nbytes / cost.seconds[step].median for cost in costs]
            for step, factor in TRAFFIC.items()
        }
        copies = [2 * cost.case.nbytes / cost.seconds["copy"].median for cost in costs]
        _draw_bars(axes[1], f"steps of kernel {first}, {title}", names, copies, bars)
    with replacing(target) as file:
        figure.savefig(file, format="png")


def _kind(cost: CaseCosts | KernelCost) -> tuple[str, str]:
    return cost.case.layout, cost.case.dtype


def _draw_bars(
    axes: Axes, title: str, names: list[str], copies: list[float], bars: dict[str, list[float]]
) -> None:
    width = 0.8 / len(bars)
    for number, ((label, values), color) in enumerate(zip(bars.items(), _COLORS, strict=False)):
        left = [i - 0.4 + (number + 0.5) * width for i in range(len(names))]
        axes.bar(left, [value / 1e9 for value in values], width, label=label, color=color)
    for i, value in enumerate(copies):
        label = "copy" if i == 0 else "_"
        axes.hlines(value / 1e9, i - 0.45, i + 0.45, _COPY_COLOR, linewidth=1.5, label=label)
    axes.set_title(title, loc="left")
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_ylabel("GB/s that must be moved")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
