"""Report of a calibration: drift of the old statistics, and standard errors of the new ones."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.calibration.context import InputStats
from syncbn.calibration.display import draw_drift, render_table
from syncbn.calibration.ranks import defer_sigint
from syncbn.files import atomic_write
from syncbn.nn.bn_layers import BNLayer, SavedStatistics, restore_running_stats

#: Smallest notable divergence, nats per channel: a mean off by a tenth of a standard deviation, or
#: a variance off by 14 %.
KL_THRESHOLD = 0.005
# Share of noise in the divergence above which the calibration set is called small.
_MAX_NOISE_SHARE = 0.25
_HEADINGS = ("layer", "samples", "values", "mean shift", "± error", "var ratio", "± error", "KL")


class ChannelDrift(NamedTuple):
    """Statistics of a layer by channel, float64 ``[C]`` on the CPU; errors are NaN for one sample.

    Attributes:
        old_mean: mean before the calibration.
        old_var: variance before the calibration.
        new_mean: mean after the calibration.
        new_var: variance after the calibration.
        mean_error: standard error of the new mean.
        var_error: standard error of the new variance.
        between: variance between the means of samples; NaN for one sample.
        shift: change of the mean, in new standard deviations.
        log_ratio: logarithm of new over old variance.
    """

    old_mean: Tensor
    old_var: Tensor
    new_mean: Tensor
    new_var: Tensor
    mean_error: Tensor
    var_error: Tensor
    between: Tensor
    shift: Tensor
    log_ratio: Tensor


@dataclass(frozen=True)
class LayerReport:
    """Figures of one layer, over its channels. The layer divides by sqrt(var + eps).

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
    def from_stats(layer: BNLayer, stats: InputStats, *old_buffers: Tensor) -> LayerReport:
        """Return the report on the current statistics of a layer.

        Args:
            layer: layer with its new statistics.
            stats: statistics of its inputs.
            old_buffers: mean and variance to compare with, shape ``[C]``.
        """
        buffers = (*old_buffers, layer.running_mean, layer.running_var)
        old_mean, old_var, new_mean, new_var = (buffer.cpu().double() for buffer in buffers)
        mean_error, var_error, between = _estimate_errors(stats)
        old_square, new_square = old_var + layer.module.eps, new_var + layer.module.eps
        shift = (new_mean - old_mean) / new_square.sqrt()
        log_ratio = torch.log(new_square / old_square)
        relative = (new_mean - old_mean).square() / old_square
        shift_error, ratio_error = mean_error / new_square.sqrt(), var_error / new_square
        return LayerReport(
            name=layer.name,
            samples=stats.samples,
            count=int(stats.moments.count),
            mean_shift=_rms(shift),
            var_ratio=math.exp(float(log_ratio.mean())),
            log_var_ratio=_rms(log_ratio),
            kl=float((log_ratio.exp() - 1 - log_ratio + relative).mean() / 2),
            mean_error=_rms(shift_error),
            var_error=_rms(ratio_error),
            noise=float((shift_error.square() / 2 + ratio_error.square() / 4).mean()),
            channels=ChannelDrift(
                *(old_mean, old_var, new_mean, new_var),
                *(mean_error, var_error, between, shift, log_ratio),
            ),
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
    _undo: SavedStatistics = field(repr=False)

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
        # Old statistics relative to the new ones, which are the zero line.
        means = [-x.channels.shift for x in layers], [x.mean_error for x in layers]
        variances = [-x.channels.log_ratio for x in layers], [x.var_error for x in layers]
        draw_drift(Path(path), [layer.name for layer in layers], means, variances)

    def undo(self) -> None:
        """Restore the old statistics, in place."""
        with defer_sigint():
            restore_running_stats(self._undo)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _estimate_errors(stats: InputStats) -> Tensor:
    """Return the standard errors of the mean and variance, and the variance between samples' means.

    Samples are the independent draws, not the pixels of a sample: the error of a ratio estimator
    (Cochran, Sampling Techniques, 3rd ed., 1977, section 2.11).

    Returns:
        Float64 ``[3, C]`` on the CPU; NaN for one sample.
    """
    moments, (samples, squares), sums = stats.moments, stats.scatter()[:2], stats.scatter()[2:]
    m, mm, q, qq, mq = sums.chunk(5)
    shift, var = moments.mean() - stats.pivot, moments.variance()
    # With d_i = n_i (m_i - mean) and e_i = (sum of squares around the mean) - n_i var.
    dd = mm - 2 * shift * m + shift.square() * squares
    rest = shift.square() - var
    ee = (
        qq + 4 * shift.square() * mm + rest.square() * squares
        - 4 * shift * mq + 2 * rest * q - 4 * shift * rest * m
    )  # fmt: skip
    dd, ee = dd.clamp(min=0), ee.clamp(min=0)
    bessel = samples / (samples - 1)  # infinite or NaN for one sample
    scale = bessel.sqrt() / moments.count
    values = torch.stack([dd.sqrt() * scale, ee.sqrt() * scale, bessel * dd / squares])
    return torch.where(values.isfinite(), values, torch.nan).cpu()
