"""The picture of the calibration study."""

from collections.abc import Callable
from pathlib import Path

from calibration_table import Finding, Robustness, spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter
from storage import writing

GREY, COLORS = "#6b7280", ("#d97706", "#059669", "#1d4ed8")
# Where a distance of zero is drawn.
ZERO = 1e-10


def draw(
    findings: list[list[Finding]],
    noisy: list[list[Robustness]],
    flat: list[list[Robustness]],
    target: Path,
) -> None:
    """Draw distance and loss by calibration batch, and accuracy by corruption.

    Args:
        findings: results per seed, in the same order.
        noisy: results per seed and noise level.
        flat: results per seed and loss of contrast.
        target: the PNG to write.
    """
    # A Figure without pyplot has no global state and needs no display.
    figure = Figure(figsize=(10, 7.6), dpi=150, layout="constrained")
    figure.suptitle(
        "ResNet-20 on digits, trained with two samples a rank: "
        f"mean and range of {len(findings)} runs",
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    (distance, loss), (noise, contrast) = figure.subplots(2, 2)
    _by_batch(distance, findings, lambda f: max(f.distance, ZERO))
    distance.set_yscale("log")
    distance.set_title(
        "running statistics: distance from the population's\n(KL, nats a channel)",
        loc="left",
        fontsize=10,
    )
    _by_batch(loss, [_above_exact(seed) for seed in findings], lambda f: f.loss)
    loss.axhline(0.0, color="black", linewidth=0.8)
    loss.set_title(
        "test loss, less that with the population's statistics\n(cross-entropy, nats)",
        loc="left",
        fontsize=10,
    )
    distance.annotate("exactly zero", (64, ZERO), (0, 6), textcoords="offset points", fontsize=9)
    distance.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(0.0, 0.35))
    _by_strength(noise, noisy)
    noise.set_title("test accuracy on noisy images", loc="left", fontsize=10)
    noise.set_xlabel("standard deviation of the noise (that of the images is 1)")
    _by_strength(contrast, flat)
    contrast.set_title("test accuracy on flat images", loc="left", fontsize=10)
    contrast.set_xlabel("loss of contrast")
    contrast.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    noise.legend(frameon=False, fontsize=9)
    for axes in (distance, loss, noise, contrast):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
    with writing(target) as file:
        figure.savefig(file, format="png")


def _above_exact(findings: list[Finding]) -> list[Finding]:
    exact = findings[-1].loss  # in lockstep, of the largest batch
    return [finding._replace(loss=finding.loss - exact) for finding in findings]


def _by_batch(axes: Axes, findings: list[list[Finding]], value: Callable[[Finding], float]) -> None:
    tools = list(dict.fromkeys(finding.tool for finding in findings[0]))
    trained = spread([value(seed[0]) for seed in findings])[0]
    axes.axhline(trained, color=GREY, linestyle="--", label=f"{tools[0]} (moving averages)")
    for tool, color in zip(tools[1:], COLORS, strict=True):
        rows = list(zip(*([f for f in seed if f.tool == tool] for seed in findings), strict=True))
        sizes = [row[0].batch_size for row in rows]
        _line(axes, sizes, [spread([value(f) for f in row]) for row in rows], color, tool)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("calibration batch size")


def _by_strength(axes: Axes, found: list[list[Robustness]]) -> None:
    strengths = [robustness.strength for robustness in found[0]]
    plain, mixed = (
        [spread([seed[i][column] for seed in found]) for i in range(len(strengths))]
        for column in (1, 2)
    )
    _line(axes, strengths, plain, GREY, "running statistics")
    _line(axes, strengths, mixed, COLORS[2], "prior_mix, 16 pseudo-samples, batches of 32")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _line(
    axes: Axes,
    x: list[int] | list[float],
    spreads: list[tuple[float, float, float]],
    color: str,
    label: str,
) -> None:
    middle, low, high = zip(*spreads, strict=True)
    axes.plot(x, middle, color=color, marker="o", markersize=4, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
