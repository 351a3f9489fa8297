"""How far apart two pairs of running statistics are, in the units of the layer that uses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Nats a channel from which a change is worth making: that of a mean a tenth of a standard
#: deviation off, or a variance 14 % off.
NOTICEABLE = 0.005


@dataclass(frozen=True)
class Channels:
    """A layer's statistics by channel, all float64 ``[C]`` on the CPU.

    Attributes:
        old_mean: before the calibration.
        old_var: before the calibration.
        new_mean: after it.
        new_var: after it.
        mean_error: standard error of the new mean; NaN if one sample was seen.
        var_error: standard error of the new variance, likewise.
        between: variance between the means of the samples, likewise.
        eps: of the layer; divides by sqrt(var + eps).
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
        """Return by how many new standard deviations the mean moves."""
        return (self.new_mean - self.old_mean) / (self.new_var + self.eps).sqrt()

    def log_ratio(self) -> Tensor:
        """Return the logarithm of new over old variance."""
        return torch.log((self.new_var + self.eps) / (self.old_var + self.eps))

    def divergence(self) -> Tensor:
        """Return KL(new || old) of the Gaussians with these statistics, in nats."""
        log_ratio = self.log_ratio()
        old_scale = self.old_var + self.eps
        squares = (self.new_mean - self.old_mean).square() / old_scale
        return (log_ratio.exp() - 1 - log_ratio + squares) / 2

    def shift_error(self) -> Tensor:
        """Return the standard error of the shift, from that of the new mean."""
        return self.mean_error / (self.new_var + self.eps).sqrt()

    def log_ratio_error(self) -> Tensor:
        """Return the standard error of the logarithm, from that of the new variance."""
        return self.var_error / (self.new_var + self.eps)

    def noise(self) -> Tensor:
        """Return the divergence that the errors alone amount to, in nats."""
        return self.shift_error().square() / 2 + self.log_ratio_error().square() / 4


def rms(values: Tensor) -> float:
    """Return the root of the mean square."""
    return float(values.square().mean().sqrt())
