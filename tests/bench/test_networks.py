"""Networks of the benchmarks, compared with the paper and the example."""

from __future__ import annotations

import torch
from config import Arch, ModelConfig
from resnet import build_resnet
from torch import nn

from syncbn.bench.networks import resnet20, resnet50


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _num_norms(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


def test_resnet20_equals_the_example() -> None:
    network = resnet20()
    model = ModelConfig(Arch.resnet20, width=16, zero_init_residual=False, weights=None)
    example = build_resnet(model, channels=3, num_classes=10, seed=0)
    tensors = zip(network.state_dict().values(), example.state_dict().values(), strict=True)
    for tensor, other in tensors:
        tensor.copy_(other)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(network(images), example(images))
    assert (_num_norms(network), _num_parameters(network)) == (19, 269_722)


def test_resnet50_has_the_parameters_of_the_paper() -> None:
    network = resnet50()
    assert (_num_norms(network), _num_parameters(network)) == (53, 25_557_032)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 1000)
