"""Report of a calibration: drift of the old statistics, and standard errors of the new ones."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.calibration.display import draw_drift, render_table
from syncbn.calibration.input_stats import InputStats, Population, estimate_population
from syncbn.calibration.sigint import defer_sigint
from syncbn.files import atomic_write
from syncbn.nn.bn_layers import BNLayer, RunningStats, restore_running_stats

#: Smallest notable divergence, nats per channel: a mean off by a tenth of a standard deviation, or
#: a variance off by 14 %.
KL_THRESHOLD = 0.005
# Share of noise in the divergence above which the calibration set is called small.
_MAX_NOISE_SHARE = 0.25
_HEADINGS = ("layer", "samples", "values", "mean shift", "± error", "var ratio", "± error", "KL")


@dataclass(frozen=True)
class ChannelDrift:
    """Statistics of a layer by channel, float64 ``[C]`` on the CPU.

    Attributes:
        old_mean: mean before the calibration.
        old_var: variance before the calibration.
        new_mean: mean after the calibration.
        new_var: variance after the calibration.
        mean_error: standard error of the new mean; NaN for one sample.
        var_error: standard error of the new variance; NaN for one sample.
        between: variance between the means of samples; NaN for one sample.
        eps: epsilon of the layer, which divides by sqrt(var + eps).
    """

    old_mean: Tensor
    old_var: Tensor
    new_mean: Tensor
    new_var: Tensor
    mean_error: Tensor
    var_error: Tensor
    between: Tensor
    eps: float

    def shift(self) -> Tensor:
        """Return the change of the mean, in new standard deviations."""
        return (self.new_mean - self.old_mean) / (self.new_var + self.eps).sqrt()

    def log_ratio(self) -> Tensor:
        """Return the logarithm of new over old variance."""
        return torch.log((self.new_var + self.eps) / (self.old_var + self.eps))

    def divergence(self) -> Tensor:
        """Return KL(new || old) of the Gaussians with these statistics, in nats."""
        log_ratio = self.log_ratio()
        squares = (self.new_mean - self.old_mean).square() / (self.old_var + self.eps)
        return (log_ratio.exp() - 1 - log_ratio + squares) / 2

    def shift_error(self) -> Tensor:
        """Return the standard error of the shift, from the error of the new mean."""
        return self.mean_error / (self.new_var + self.eps).sqrt()

    def log_ratio_error(self) -> Tensor:
        """Return the standard error of the logarithm, from the error of the new variance."""
        return self.var_error / (self.new_var + self.eps)

    def noise(self) -> Tensor:
        """Return the divergence expected from the standard errors alone, in nats."""
        return self.shift_error().square() / 2 + self.log_ratio_error().square() / 4


@dataclass(frozen=True)
class LayerReport:
    """Figures of one layer, over its channels.

    Attributes:
        name: name in the plain model.
        samples: samples that reached the layer, on all ranks.
        count: values per channel, on all ranks.
        mean_shift: root mean square of the change of the mean, in new standard deviations.
        var_ratio: geometric mean of new over old variance.
        log_var_ratio: root mean square of the logarithm of that ratio.
        kl: mean of KL(new || old) of the Gaussians with these statistics, in nats.
        mean_error: root mean square of the standard error of the new mean, in standard deviations.
        var_error: root mean square of the relative standard error of the new variance.
        noise: contribution to kl expected from the standard errors alone, in nats.
        channels: statistics by channel.
    """

    name: str
    samples: int
    count: int
    mean_shift: float
    var_ratio: float
    log_var_ratio: float
    kl: float
    mean_error: float
    var_error: float
    noise: float
    channels: ChannelDrift = field(repr=False)

    @staticmethod
    def from_channels(name: str, population: Population, channels: ChannelDrift) -> LayerReport:
        """Return the figures of a layer."""
        return LayerReport(
            name=name,
            samples=population.samples,
            count=population.count,
            mean_shift=_rms(channels.shift()),
            var_ratio=math.exp(float(channels.log_ratio().mean())),
            log_var_ratio=_rms(channels.log_ratio()),
            kl=float(channels.divergence().mean()),
            mean_error=_rms(channels.shift_error()),
            var_error=_rms(channels.log_ratio_error()),
            noise=float(channels.noise().mean()),
            channels=channels,
        )

    def figures(self) -> dict[str, Any]:
        """Return the name and the figures for JSON, with None for non-finite values."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in vars(self).items()
            if key != "channels"
        }


@dataclass(frozen=True)
class CalibrationReport:
    """Result of :func:`syncbn.recalibrate`.

    Attributes:
        layers: calibrated layers, in the order of the forward.
        not_reached: names of layers that no batch reached; they keep their statistics.
        left_alone: names of layers that were not to be calibrated: frozen in evaluation mode, or
            excluded by the ``layers`` and ``skip`` of the call.
        verification: comparison of ``lockstep`` with single passes, or the reason for
            ``sequential`` in its place; empty for other methods.
    """

    layers: list[LayerReport]
    not_reached: list[str]
    left_alone: list[str]
    verification: str
    _undo: RunningStats = field(repr=False)

    @staticmethod
    def from_stats(
        results: dict[BNLayer, InputStats],
        old: RunningStats,
        undo: RunningStats,
        left_alone: list[str],
        verification: str,
    ) -> CalibrationReport:
        """Return the report on the current statistics of layers.

        Args:
            results: statistics of the inputs of the layers that were reached.
            old: statistics to compare with, the same on every rank, for all layers.
            undo: old statistics of this rank.
            left_alone: names of the layers that were not to be calibrated.
            verification: sentence on the verification, or empty.
        """
        reports = []
        for layer, stats in results.items():
            population = estimate_population(stats)
            _, old_mean, old_var = old[layer.index]
            channels = ChannelDrift(
                old_mean=old_mean.cpu().double(),
                old_var=old_var.cpu().double(),
                new_mean=layer.running_mean.cpu().double(),
                new_var=layer.running_var.cpu().double(),
                mean_error=population.mean_error,
                var_error=population.var_error,
                between=population.between,
                eps=layer.module.eps,
            )
            reports.append(LayerReport.from_channels(layer.name, population, channels))
        not_reached = [layer.name for layer, _, _ in old if layer not in results]
        return CalibrationReport(reports, not_reached, left_alone, verification, undo)

    def between(self) -> dict[str, Tensor]:
        """Return the variance between the means of samples, float64 ``[C]`` by layer name.

        The argument of :func:`syncbn.inference.example_weighted`; store it with ``torch.save``.
        """
        return {layer.name: layer.channels.between for layer in self.layers}

    def verdict(self) -> str:
        """Return in a line whether recalibration was needed, and whether the data was enough."""
        worst = max(self.layers, key=lambda layer: layer.kl if layer.kl == layer.kl else math.inf)
        change = (
            f"{worst.name} by {worst.mean_shift:.2g} standard deviations of the mean and a factor "
            f"of {worst.var_ratio:.3g} of the variance"
        )
        if not math.isfinite(worst.kl):
            return f"the old statistics of {worst.name} are not usable: they are not finite"
        if worst.kl < KL_THRESHOLD:
            text = f"running statistics are fine; recalibration changes most {change}"
        else:
            text = f"recalibration changes {change}"
        if not worst.noise < max(_MAX_NOISE_SHARE * worst.kl, KL_THRESHOLD):
            text += f"; {worst.samples} samples are few: the new statistics are uncertain, too"
        return text

    def table(self) -> str:
        """Return the figures of all layers as text, with the verdict."""
        rows = [
            (
                *(layer.name, str(layer.samples), f"{layer.count:.3g}"),
                *(f"{layer.mean_shift:.3f}", f"{layer.mean_error:.3f}"),
                *(f"{layer.var_ratio:.3f}", f"{layer.var_error:.3f}", f"{layer.kl:.4f}"),
            )
            for layer in self.layers
        ]
        notes = [
            "mean shift: in standard deviations (root mean square over channels); var ratio: new "
            "over old (geometric mean); errors: standard errors of the new ones; KL: nats per "
            "channel"
        ]
        if self.not_reached:
            notes.append(f"not reached, unchanged: {', '.join(self.not_reached)}")
        if self.left_alone:
            notes.append(
                "left alone (frozen in evaluation mode, or excluded by layers= or skip=): "
                f"{', '.join(self.left_alone)}"
            )
        if self.verification:
            notes.append(f"verification: {self.verification}")
        return render_table(_HEADINGS, rows, [*notes, self.verdict()])

    def save(self, path: str | Path) -> None:
        """Write the figures of all layers as JSON; the file is complete or absent.

        Raises:
            ValueError: ``path`` exists and is not a regular file.
            OSError: the file cannot be written.
        """
        content = {
            "verdict": self.verdict(),
            "layers": [layer.figures() for layer in self.layers],
            "not_reached": self.not_reached,
            "left_alone": self.left_alone,
            "verification": self.verification or None,
        }
        with atomic_write(Path(path)) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())

    def plot(self, path: str | Path) -> None:
        """Draw drift against depth.

        Raises:
            ValueError: ``path`` exists and is not a regular file.
            OSError: the file cannot be written.
            ImportError: matplotlib is not installed.
        """
        layers = self.layers
        channels = [layer.channels for layer in layers]
        # Old statistics relative to the new ones, which are the zero line.
        means = [-c.shift() for c in channels], [layer.mean_error for layer in layers]
        variances = [-c.log_ratio() for c in channels], [layer.var_error for layer in layers]
        draw_drift(Path(path), [layer.name for layer in layers], means, variances)

    def undo(self) -> None:
        """Restore the old statistics, in place."""
        with defer_sigint():
            restore_running_stats(self._undo)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
