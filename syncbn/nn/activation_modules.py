"""Modules of torch that are activations of the layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from syncbn.kernels.activations import Activation, ActivationName
from syncbn.nn.fx_call import has_hooks
from syncbn.ops.validation import check_activation

_NAMES: dict[type[nn.Module], ActivationName] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
}


def find_activation(module: nn.Module) -> Activation | None:
    """Return the activation that a module applies; None for other modules and with hooks."""
    name = _NAMES.get(type(module))
    if name is None or has_hooks(module):
        return None
    return make_activation(name, vars(module))


def make_activation(name: ActivationName, options: Mapping[str, object]) -> Activation | None:
    """Return an activation; None for options that the layers do not have.

    Args:
        name: name of the activation.
        options: attributes of its module, or arguments of its function, by name.
    """
    if options.get("approximate", "none") != "none":
        return None
    try:
        return check_activation(name, options.get("negative_slope", 0.01))
    except ValueError:  # a slope that is negative
        return None
