"""The demo's picture: distance from one process at every step, and test accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

from syncbn.cli.signals import deferred_termination
from syncbn.files import atomic_write

REFERENCE, LOCAL, SYNC = "#9ca3af", "#d97706", "#1d4ed8"
# Float64 resolves no difference below this at a loss near one; equal losses are drawn here.
RESOLUTION = 1e-16


class Run(NamedTuple):
    """A way to train.

    Attributes:
        title: name of the run.
        losses: training loss of the first steps, in float64.
        epochs: position of each test accuracy, in epochs.
        accuracies: test accuracy after each epoch, from 0 to 1.
    """

    title: str
    losses: list[float]
    epochs: list[float]
    accuracies: list[float]


def draw(single: Run, local: Run, sync: Run, target: Path) -> None:
    """Draw the distance from the reference step by step, and the test accuracies.

    Args:
        single: one process at the global batch, the reference.
        local: two ranks with local batch norm.
        sync: two ranks with `syncbn.SyncBatchNorm`.
        target: the PNG to write.
    """
    # A Figure without pyplot has no global state and needs no display.
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    figure.suptitle(
        "Two samples a rank: with synchronized batch norm, two ranks train as one process",
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    distance, accuracy = figure.subplots(1, 2)
    _draw_distance(distance, single, ((local, LOCAL), (sync, SYNC)))
    _draw_accuracy(accuracy, ((single, REFERENCE), (local, LOCAL), (sync, SYNC)))
    for axes in (distance, accuracy):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
    with deferred_termination(), atomic_write(target) as file:
        figure.savefig(file, format="png")


def _draw_distance(axes: Axes, single: Run, runs: tuple[tuple[Run, str], ...]) -> None:
    steps = list(range(1, len(single.losses) + 1))
    for run, color in runs:
        gaps = [abs(a - b) for a, b in zip(run.losses, single.losses, strict=True)]
        visible = [max(gap, RESOLUTION) for gap in gaps]
        axes.plot(steps, visible, color=color, marker="o", markersize=4, label=run.title)
    axes.set_title("training loss: distance from one process at batch 4", loc="left", fontsize=10)
    axes.set_xlabel("step (float64)")
    axes.set_yscale("log")
    axes.set_ylim(RESOLUTION / 3, 10)
    axes.xaxis.set_major_locator(MultipleLocator(5))
    axes.legend(frameon=False, loc="center right")


def _draw_accuracy(axes: Axes, runs: tuple[tuple[Run, str], ...]) -> None:
    for run, color in runs:
        label = f"{run.title}: {run.accuracies[-1]:.1%}"
        width = 5 if color == REFERENCE else 1.8
        axes.plot(run.epochs, run.accuracies, color=color, marker="o", linewidth=width, label=label)
    axes.set_title("test accuracy", loc="left", fontsize=10)
    axes.set_xlabel("epoch")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower right")
