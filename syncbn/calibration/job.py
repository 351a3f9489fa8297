"""What every method of calibration is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from syncbn.calibration.batches import Batches, Forward
from syncbn.calibration.layers import Layer
from syncbn.calibration.ranks import Ranks
from syncbn.calibration.samples import Samples
from syncbn.calibration.sums import Sums


@dataclass(frozen=True)
class Job:
    """A calibration, the same on every rank but for its batches.

    Attributes:
        model: in inference mode; communicates with nobody.
        layers: whose statistics are wanted.
        pivots: of the layers, near their means, float64 ``[C]``: the old running means.
        batches: of this rank.
        forward: runs a batch through the model.
        ranks: that calibrate together.
        max_bytes: that suspended passes may take on this rank; None for any number.
        report_progress: called with how much is done and how much there is, in units of the method.
        report_check: called with a sentence on how the result was verified.
    """

    model: nn.Module
    layers: list[Layer]
    pivots: list[Tensor]
    batches: Batches
    forward: Forward
    ranks: Ranks
    max_bytes: int | None
    report_progress: Callable[[int, int], None]
    report_check: Callable[[str], None]

    def run(self, batch: Any) -> None:
        """Run a batch through the model."""
        self.forward(self.model, batch)

    def samples(self, layer: Layer, precise: bool = True) -> Samples:
        """Return what adds up the inputs of a layer; whoever can add them twice may be fast."""
        return Samples(self.pivots[layer.index], precise)

    def total(self, layer: Layer, samples: Samples) -> Sums:
        """Return the sums over the samples of all ranks; every rank must call this.

        Raises:
            ValueError: some values are not finite, or there is only one a channel.
        """
        sums = samples.sums()
        message = self.ranks.sum(sums.pack(), f"calibration of {layer.name}")
        total = Sums.unpack(message, sums.pivot)
        if not bool(message.isfinite().all()):
            raise ValueError(
                f"{layer.name}: the inputs have NaN or infinite values, or squares beyond float64; "
                "expected finite activations (check the weights, the data, and the layers before)"
            )
        if total.moments.count == 1:
            raise ValueError(
                f"{layer.name}: got one value a channel in the whole calibration set, which has no "
                "variance; expected two or more samples"
            )
        return total
