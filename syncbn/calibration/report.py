"""What a calibration has changed, and how well the new statistics are known."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from syncbn.calibration.drift import NOTICEABLE, Channels, rms
from syncbn.calibration.interrupts import uninterrupted
from syncbn.calibration.layers import Layer
from syncbn.calibration.population import Population
from syncbn.calibration.sums import Sums
from syncbn.files import atomic_write

# Of the change, what noise may make up before the calibration set is called small.
_NOISY = 0.25


@dataclass(frozen=True)
class LayerReport:
    """One layer; figures over its channels.

    Attributes:
        name: in the model.
        samples: that came to it, on all ranks.
        count: values per channel, on all ranks.
        mean_shift: root mean square of the change of the mean, in new standard deviations.
        var_ratio: geometric mean of new over old variance.
        log_var_ratio: root mean square of the logarithm of that ratio.
        kl: mean of KL(new || old) of the Gaussians with these statistics, nats.
        mean_error: root mean square of the standard error of the new mean, in standard deviations.
        var_error: that of the new variance, relative to it.
        noise: what these errors alone would add to kl.
        channels: everything by channel.
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
    channels: Channels = field(repr=False)

    @staticmethod
    def of(name: str, population: Population, channels: Channels) -> LayerReport:
        """Return the figures of a layer."""
        return LayerReport(
            name=name,
            samples=population.samples,
            count=population.count,
            mean_shift=rms(channels.shift()),
            var_ratio=math.exp(float(channels.log_ratio().mean())),
            log_var_ratio=rms(channels.log_ratio()),
            kl=float(channels.divergence().mean()),
            mean_error=rms(channels.shift_error()),
            var_error=rms(channels.log_ratio_error()),
            noise=float(channels.noise().mean()),
            channels=channels,
        )

    def figures(self) -> dict[str, Any]:
        """Return name and figures for JSON, in which what is not finite is None."""
        found = {k: v for k, v in vars(self).items() if k != "channels"}
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in found.items()
        }


@dataclass(frozen=True)
class CalibrationReport:
    """The result of :func:`syncbn.recalibrate`.

    Attributes:
        layers: that were calibrated, in the order of the forward.
        not_reached: names of layers that no batch came to; they keep their statistics.
        left_alone: names of layers that were not to be calibrated: frozen in evaluation mode, or
            excluded by the ``layers`` and ``skip`` of the call.
        verification: comparison of ``lockstep`` with single passes, or the reason for
            ``sequential`` in its place; empty for other methods.
    """

    layers: list[LayerReport]
    not_reached: list[str]
    left_alone: list[str]
    verification: str
    _undo: list[tuple[Layer, Tensor, Tensor]] = field(repr=False)

    @staticmethod
    def of(
        layers: list[Layer],
        left_alone: list[str],
        old: list[tuple[Tensor, Tensor]],
        own: list[tuple[Tensor, Tensor]],
        totals: dict[Layer, Sums],
        verification: str,
    ) -> CalibrationReport:
        """Compare the statistics of layers with their old ones.

        Args:
            layers: calibrated layers of the model.
            left_alone: names of its other layers.
            old: statistics to compare with, the same on every rank.
            own: statistics that this rank had, to put back.
            totals: sums over the inputs of the layers that were reached.
            verification: sentence on how the result was verified, or empty.
        """
        reports = []
        for layer, sums in totals.items():
            population = Population.of(sums.moments, sums.spread, sums.pivot)
            old_mean, old_var = old[layer.index]
            channels = Channels(
                old_mean=old_mean.cpu().double(),
                old_var=old_var.cpu().double(),
                new_mean=layer.running_mean.cpu().double(),
                new_var=layer.running_var.cpu().double(),
                mean_error=population.mean_error,
                var_error=population.var_error,
                between=population.between,
                eps=layer.module.eps,
            )
            reports.append(LayerReport.of(layer.name, population, channels))
        return CalibrationReport(
            layers=reports,
            not_reached=[layer.name for layer in layers if layer not in totals],
            left_alone=left_alone,
            verification=verification,
            _undo=[(layer, *own[layer.index]) for layer in layers],
        )

    def between(self) -> dict[str, Tensor]:
        """Return the variance between the means of samples, float64 ``[C]`` by name of the layer.

        For :func:`syncbn.inference.example_weighted`; ``torch.save`` keeps it beside a checkpoint.
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
        if worst.kl < NOTICEABLE:
            text = f"running statistics are fine; recalibration changes most {change}"
        else:
            text = f"recalibration changes {change}"
        if not worst.noise < max(_NOISY * worst.kl, NOTICEABLE):
            text += f"; {worst.samples} samples are few: the new statistics are uncertain, too"
        return text

    def table(self) -> str:
        """Return the figures of all layers as text, with the verdict."""
        from syncbn.calibration.table import render

        return render(self)

    def save(self, path: str | Path) -> None:
        """Write the figures of all layers as JSON; the file is complete or absent.

        Raises:
            ValueError: ``path`` exists and is not a regular file.
            OSError: the file cannot be written.
        """
        found = {
            "verdict": self.verdict(),
            "layers": [layer.figures() for layer in self.layers],
            "not_reached": self.not_reached,
            "left_alone": self.left_alone,
            "verification": self.verification or None,
        }
        with atomic_write(Path(path)) as file:
            file.write((json.dumps(found, indent=2) + "\n").encode())

    def plot(self, path: str | Path) -> None:
        """Draw drift against depth.

        Raises:
            ValueError: ``path`` exists and is not a regular file.
            OSError: the file cannot be written.
            ImportError: matplotlib is not installed.
        """
        from syncbn.calibration.plot import draw

        draw(self, Path(path))

    def undo(self) -> None:
        """Put the old statistics back, in place."""
        with uninterrupted():
            for layer, mean, var in self._undo:
                layer.use(mean, var)
