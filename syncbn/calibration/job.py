"""What every method of calibration is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.calibration.batches import Batches, Forward
from syncbn.calibration.layers import Layer
from syncbn.calibration.population import Population, Spread
from syncbn.calibration.ranks import Ranks
from syncbn.kernels import choose
from syncbn.moments import Moments


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
    """

    model: nn.Module
    layers: list[Layer]
    pivots: list[Tensor]
    batches: Batches
    forward: Forward
    ranks: Ranks
    max_bytes: int | None
    report_progress: Callable[[int, int], None]

    def run(self, batch: Any) -> None:
        """Run a batch through the model."""
        self.forward(self.model, batch)

    def nothing(self, layer: Layer) -> Sums:
        """Return the sums over no values of a layer."""
        return Sums.nothing(self.pivots[layer.index])

    def total(self, layer: Layer, sums: Sums) -> Sums:
        """Return the sums of all ranks; every rank must call this.

        Raises:
            ValueError: some values are not finite, or there is only one a channel.
        """
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


@dataclass(frozen=True)
class Sums:
    """Everything that is summed over the inputs of a layer; sums add.

    Attributes:
        moments: of all values.
        spread: of all samples, about the pivot.
        pivot: float64 ``[C]``.
    """

    moments: Moments
    spread: Spread
    pivot: Tensor

    @staticmethod
    def nothing(pivot: Tensor) -> Sums:
        """Return the sums over no values."""
        channels = pivot.numel()
        return Sums.unpack(pivot.new_zeros(2 * channels + 1 + 5 * channels + 2), pivot)

    @staticmethod
    def of(x: Tensor, pivot: Tensor) -> Sums:
        """Return the sums over a layer's input, ``[N, C, *]``."""
        moments = Moments.unpack(choose("auto", x).moments(x))
        return Sums(moments, Spread.of(x, pivot), pivot)

    @staticmethod
    def unpack(vector: Tensor, pivot: Tensor) -> Sums:
        """Read the message format, ``[7C + 3]``."""
        split = 2 * pivot.numel() + 1
        return Sums(Moments.unpack(vector[:split]), Spread.unpack(vector[split:]), pivot)

    def pack(self) -> Tensor:
        """Return the message, float64 ``[7C + 3]``."""
        return torch.cat([self.moments.pack(), self.spread.pack()])

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.moments + other.moments, self.spread.plus(other.spread), self.pivot)

    def population(self) -> Population:
        """Return what the sums say about the population."""
        return Population.of(self.moments, self.spread, self.pivot)
