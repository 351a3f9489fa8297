"""Rows of tests for the inference rules, and their networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from syncbn.inference import (
    convert_example_weighted,
    convert_prior_mix,
    example_weighted,
    prior_mix,
)
from tests.calibration.networks import layers, network


def between(net: nn.Module) -> dict[str, Tensor]:
    """Return a between-sample variance for every layer, smaller than its variance."""
    return {name: 0.3 * layer.running_var.detach() for name, layer in layers(net).items()}


#: name: (context manager, conversion), functions of a network and the argument of the rule.
RULES: dict[str, tuple[Any, Any]] = {
    "prior_mix": (
        lambda net, weight=16: prior_mix(net, weight),
        lambda net: convert_prior_mix(net, 16),
    ),
    "example_weighted": (
        lambda net, weight=4: example_weighted(net, weight, between(net)),
        lambda net: convert_example_weighted(net, 4, between(net)),
    ),
}


def eval_network() -> nn.Sequential:
    """Return the network in evaluation mode."""
    net = network()
    return net.eval()


def single(channels: int, dtype: torch.dtype = torch.float64, eps: float = 1e-5) -> nn.BatchNorm2d:
    """Return a layer in evaluation mode with non-trivial statistics and parameters."""
    layer: Any = nn.BatchNorm2d(channels, eps, dtype=dtype).eval()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2.0)
    for parameter in layer.parameters():
        parameter.data.uniform_(0.5, 1.5)
    return layer  # type: ignore[no-any-return]
