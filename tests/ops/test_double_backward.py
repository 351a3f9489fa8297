"""Gradients of gradients, over ranks, against finite differences and against one process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad, gradgradcheck

import syncbn
from tests.device import seeded
from tests.formula import Formula
from tests.ranks import Ranks
from tests.sharded import gather, replicate, scatter

pytestmark = pytest.mark.layers

# Samples on each of three ranks; two ranks take the last two.
SPLITS = {"uneven": (1, 1, 2), "an empty rank": (1, 0, 3)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without a weight": {"affine": False},
    "relu": {"activation": "relu"},
    "residual": {"residual": True},
    "relu of a residual": {"activation": "relu", "residual": True},
    "mask": {"mask": True, "activation": "relu", "residual": True},
}


def _samples(split: str, ranks: int) -> tuple[int, ...]:
    return SPLITS[split][-ranks:]


def _gradgradcheck(rank: int, sizes: tuple[int, ...], options: dict[str, Any]) -> bool:
    torch.manual_seed(0)
    shape = (sum(sizes), 2, 1)
    x, residual = torch.randn(2, *shape, dtype=torch.float64)
    weight, bias = torch.randn(2, 2, dtype=torch.float64)
    mask = torch.rand(sum(sizes), 1) < 0.7 if options.get("mask") else None
    affine, adds = options.get("affine", True), options.get("residual", False)
    for t, used in ((x, True), (residual, adds), (weight, affine), (bias, affine)):
        t.requires_grad_(used)

    def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = syncbn.sync_batch_norm(
            scatter(x, sizes),
            None,
            None,
            replicate(weight) if affine else None,
            replicate(bias) if affine else None,
            training=True,
            residual=scatter(residual, sizes) if adds else None,
            activation=options.get("activation"),
            mask=None if mask is None else mask.split(sizes)[rank],
        )
        # So that second derivatives by all inputs are not zero.
        whole: Tensor = gather(y, sizes)
        return whole * whole

    return gradgradcheck(function, (x, residual, weight, bias))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("split", SPLITS)
def test_gradgradcheck(ranks: Ranks, split: str, options: str) -> None:
    sizes = _samples(split, ranks.size)
    assert all(ranks.run(_gradgradcheck, sizes, OPTIONS[options]))


class Critic(nn.Module):
    """Two layers, one of them with a ReLU, between convolutions."""

    def __init__(self, norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 2)
        self.bn1, self.bn2 = norm(3, activation="relu"), norm(2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.first(x))
        return F.softplus(self.bn2(self.second(x))).flatten(1).sum(1)


def _penalty(critic: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradient penalty of WGAN-GP, summed over samples, and its gradients."""
    x = x.clone().requires_grad_()
    (dx,) = grad(critic(x).sum(), x, create_graph=True)
    penalty = (dx.flatten(1).norm(dim=1) - 1).square().sum()
    parameters = list(critic.parameters())
    found = grad(penalty, [x, *parameters], allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip([x, *parameters], found, strict=True)
    ]


def _hessian_vector(critic: nn.Module, x: Tensor) -> list[Tensor]:
    """The Hessian of a loss by the parameters, times a vector."""
    parameters = list(critic.parameters())
    vector = [torch.cos(torch.arange(p.numel()).double()).view_as(p) for p in parameters]
    x = x.clone().requires_grad_()
    first = grad(critic(x).square().sum(), parameters, create_graph=True)
    along = torch.stack([(g * v).sum() for g, v in zip(first, vector, strict=True)]).sum()
    return list(grad(along, [x, *parameters]))


def _third(critic: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of something of second derivatives."""
    parameters = list(critic.parameters())
    x = x.clone().requires_grad_()
    (dx,) = grad(critic(x).square().sum(), x, create_graph=True)
    (ddx,) = grad(dx.square().sum(), x, create_graph=True)
    return list(grad(ddx.square().sum(), [x, *parameters]))


MEASURES: dict[str, Callable[[nn.Module, Tensor], list[Tensor]]] = {
    "penalty": _penalty,
    "hessian times a vector": _hessian_vector,
    "third order": _third,
}


def _batch(sizes: tuple[int, ...]) -> Tensor:
    generator = seeded(1)
    return torch.randn(sum(sizes), 1, 6, 6, dtype=torch.float64, generator=generator)


def _measure(rank: int, measure: str, sizes: tuple[int, ...]) -> list[Tensor]:
    return MEASURES[measure](Critic(syncbn.SyncBatchNorm2d), _batch(sizes).split(sizes)[rank])


@pytest.mark.parametrize(
    ("measure", "split"),
    # Of third order, an empty rank has another graph: torch's convolution has no second derivative
    # of an empty batch, and the layers of the ranks do not meet.
    [pair for pair in product(MEASURES, SPLITS) if pair != ("third order", "an empty rank")],
)
def test_equals_one_process(ranks: Ranks, measure: str, split: str) -> None:
    sizes = _samples(split, ranks.size)
    wanted = MEASURES[measure](Critic(Formula), _batch(sizes))
    found = ranks.run(_measure, measure, sizes)
    torch.testing.assert_close(torch.cat([of_rank[0] for of_rank in found]), wanted[0])
    for number, gradient in enumerate(wanted[1:], start=1):
        torch.testing.assert_close(sum(of_rank[number] for of_rank in found), gradient)
