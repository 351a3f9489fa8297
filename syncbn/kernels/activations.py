"""Activations after the normalization: names, values and gradients, in operations of torch."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

#: Names of torch.nn.functional; "gelu" without the tanh approximation.
ActivationName: TypeAlias = Literal["relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu"]
NAMES: tuple[ActivationName, ...] = get_args(ActivationName)
_PIECEWISE_LINEAR = ("relu", "relu6", "leaky_relu")
_aten: Any = torch.ops.aten


class Activation(NamedTuple):
    """The last operation of a forward pass.

    Attributes:
        name: one of :data:`NAMES`.
        negative_slope: derivative below zero of "leaky_relu"; 0 for all other names.
    """

    name: ActivationName
    negative_slope: float = 0.0

    @property
    def is_piecewise_linear(self) -> bool:
        """True if the derivative is 1 or ``negative_slope``, and the output determines which."""
        return self.name in _PIECEWISE_LINEAR


def apply_activation(z: Tensor, activation: Activation | None) -> Tensor:
    """Return the activation of z, which may be overwritten; z itself for None."""
    if activation is None:
        return z
    match activation.name:
        case "relu":
            return z.relu_()
        case "relu6":
            return F.relu6(z, inplace=True)
        case "leaky_relu":
            return F.leaky_relu(z, activation.negative_slope, inplace=True)
        case "silu":
            return F.silu(z)
        case "hardswish":
            return F.hardswish(z)
        case "gelu":
            return F.gelu(z)


def activation_backward(dy: Tensor, z: Tensor, activation: Activation) -> Tensor:
    """Return the gradient of z.

    Args:
        dy: gradient of the activation.
        z: input of the activation, dtype of dy; or the output, if it is piecewise linear.
        activation: activation.
    """
    dz: Tensor
    match activation.name:
        case "relu":
            dz = _aten.threshold_backward(dy, z, 0)
        case "relu6":
            dz = _aten.hardtanh_backward(dy, z, 0, 6)
        case "leaky_relu":
            dz = _aten.leaky_relu_backward(dy, z, activation.negative_slope, False)
        case "silu":
            dz = _aten.silu_backward(dy, z)
        case "hardswish":
            dz = _aten.hardswish_backward(dy, z)
        case "gelu":
            dz = _aten.gelu_backward(dy, z)
    return dz


def unit_derivative(z: Tensor, activation: Activation) -> Tensor:
    """Return where the derivative of a piecewise linear activation is 1: bool, shape of z.

    At NaN as in torch: 1 for "relu" only.

    Args:
        z: input or output of the activation.
        activation: piecewise linear activation.
    """
    if activation.name == "leaky_relu":
        return z > 0
    return (z > 0) & (z < 6) if activation.name == "relu6" else ~(z <= 0)
