"""A picture of a run: loss and accuracy over epochs."""

from pathlib import Path

import metrics
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from storage import writing

TRAIN, TEST, PALE = "#64748b", "#c2410c", "#dbe2ea"


def plot(source: Path, target: Path, title: str) -> None:
    """Draw a metrics file.

    Args:
        source: a file written by `metrics.MetricsFile`, with at least one epoch in it.
        target: the PNG to write.
        title: title of the figure.
    """
    entries = metrics.read(source)
    steps = [entry for entry in entries if entry["kind"] == "step"]
    epochs = [entry for entry in entries if entry["kind"] == "epoch"]
    # A Figure without pyplot has no global state and needs no display.
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    loss, accuracy = figure.subplots(1, 2)

    loss.plot(*_series(steps, "loss"), color=PALE, linewidth=0.8, label="train, single steps")
    for axes, key in ((loss, "loss"), (accuracy, "accuracy")):
        for part, color in (("train", TRAIN), ("test", TEST)):
            x, y = _series(epochs, f"{part}_{key}")
            axes.plot(x, y, color=color, marker="o", markersize=4, linewidth=1.8, label=part)
        _tidy(axes, last_epoch=epochs[-1]["epoch"])

    _caption(loss, f"cross-entropy; test {epochs[-1]['test_loss']:.4f} at the end")
    loss.set_yscale("log")
    low, high = loss.get_ylim()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    loss.yaxis.set_major_formatter(plain)
    # Within one decade there may be no power of ten to put a number at.
    loss.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
    loss.legend(frameon=False, loc="lower left")

    best = max(epochs, key=lambda entry: float(entry["test_accuracy"]))
    _caption(
        accuracy,
        f"accuracy; test {100 * epochs[-1]['test_accuracy']:.2f} % at the end, "
        f"best {100 * best['test_accuracy']:.2f} %",
    )
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    low = accuracy.get_ylim()[0]
    accuracy.set_ylim(low - 0.03 * (1 - low), 1.02)
    accuracy.legend(frameon=False, loc="lower right")
    with writing(target) as file:
        figure.savefig(file, format="png")


def _series(entries: list[metrics.Entry], key: str) -> tuple[list[float], list[float]]:
    return [entry["epoch"] for entry in entries], [entry[key] for entry in entries]


def _caption(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10)


def _tidy(axes: Axes, last_epoch: float) -> None:
    # The same epochs in both panels, so that one can be read against the other.
    axes.set_xlim(0, 1.03 * last_epoch)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=last_epoch >= 2))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
