"""A network, its batches and its training, by all ranks or by one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_STEPS = 3
sgd: Callable[..., torch.optim.Optimizer] = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
adam: Callable[..., torch.optim.Optimizer] = partial(torch.optim.Adam, lr=0.1)


def network() -> Any:
    """Return a network whose last layer has fewer rows than the group has ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def batch(step: int) -> Tensor:
    """Return the whole batch of a step, which two and three ranks can share equally."""
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(step)).double()


def share(x: Tensor) -> Tensor:
    """Return this rank's part of a batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def loss(net: Any, x: Tensor) -> Tensor:
    error: Tensor = net(x) - x.sum(1, keepdim=True)
    return error.square().mean()


def train(net: Any, optimizer: torch.optim.Optimizer, take: Callable[[Tensor], Tensor]) -> None:
    """Take some steps, each on a selected part of a batch."""
    for step in range(_STEPS):
        optimizer.zero_grad()
        loss(net, take(batch(step))).backward()
        optimizer.step()


def trained_alone(optimizer: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
    """Return the parameters that one process gets from whole batches."""
    net = network()
    train(net, optimizer(net.parameters()), lambda x: x)
    return values(net)


def values(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def gradients(net: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


def compare(answers: Sequence[list[Tensor]], expected: list[Tensor], atol: float = 1e-12) -> None:
    """Compare the results of all ranks."""
    for answer in answers:
        torch.testing.assert_close(answer, expected, atol=atol, rtol=0)
