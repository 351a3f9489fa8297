"""The findings of the calibration study, and their tables."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Finding(NamedTuple):
    """A network after a calibration.

    Attributes:
        tool: name of the calibration method.
        batch_size: calibration batch size; 0 for the network as trained.
        loss: cross-entropy on the test set, nats.
        accuracy: test accuracy, from 0 to 1.
        distance: KL divergence of running from population statistics, nats per channel.
    """

    tool: str
    batch_size: int
    loss: float
    accuracy: float
    distance: float


class Robustness(NamedTuple):
    """A network on corrupted test images.

    Attributes:
        strength: corruption strength.
        plain: accuracy with running statistics.
        mixed: accuracy with test-batch statistics mixed in.
    """

    strength: float
    plain: float
    mixed: float


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, lowest and highest."""
    return float(torch.tensor(values, dtype=torch.float64).mean()), min(values), max(values)


def tables(
    findings: list[list[Finding]],
    weighted: list[list[Finding]],
    noisy: list[list[Robustness]],
    flat: list[list[Robustness]],
) -> str:
    """Return the means over seeds as tables in Markdown.

    Args:
        findings: results per seed, in the same order.
        weighted: results per seed and assumed training batch size.
        noisy: results per seed and noise level.
        flat: results per seed and loss of contrast.
    """
    tools = list(dict.fromkeys(finding.tool for finding in findings[0]))
    trained, *tools = tools
    head = ["calibration batch", *tools]
    rows = [[trained, *[_cell([seed[0] for seed in findings])] * len(tools)]]
    for first in range(1, len(findings[0]), len(tools)):
        cells = [_cell([s[first + i] for s in findings]) for i in range(len(tools))]
        rows.append([str(findings[0][first].batch_size), *cells])
    corrupted = [
        [
            *_accuracies([seed[level] for seed in noisy]),
            *_accuracies([seed[level] for seed in flat]),
        ]
        for level in range(len(noisy[0]))
    ]
    columns = ["noise", "plain", "prior_mix", "loss of contrast", "plain", "prior_mix"]
    shares = [
        [str(found[0].batch_size), *_mean_loss_and_accuracy(list(found))]
        for found in zip(*weighted, strict=True)
    ]
    return "\n".join(
        (
            _markdown(head, rows),
            _markdown(["B", "cross-entropy", "accuracy"], shares),
            _markdown(columns, corrupted),
        )
    )


def _cell(findings: list[Finding]) -> str:
    distance = spread([finding.distance for finding in findings])[0]
    return ", ".join((*_mean_loss_and_accuracy(findings), f"{distance:.1e}"))


def _mean_loss_and_accuracy(findings: list[Finding]) -> tuple[str, str]:
    loss, accuracy = (
        spread(values)[0] for values in zip(*((f.loss, f.accuracy) for f in findings), strict=True)
    )
    return f"{loss:.4f}", f"{accuracy:.2%}"


def _accuracies(found: list[Robustness]) -> list[str]:
    plain, mixed = (spread(values)[0] for values in zip(*(f[1:] for f in found), strict=True))
    return [f"{found[0].strength}", f"{plain:.1%}", f"{mixed:.1%}"]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
