"""Gradients of gradients, over ranks, against finite differences and against one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, grad, gradgradcheck

import syncbn
from tests.device import seeded
from tests.formula import Formula
from tests.ranks import Pool, Ranks

pytestmark = pytest.mark.layers

# Samples on each of three ranks.
UNEVEN, EMPTY = (1, 1, 2), (1, 0, 3)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without a weight": {"affine": False},
    "relu": {"activation": "relu"},
    "residual": {"residual": True},
    "relu of a residual": {"activation": "relu", "residual": True},
    "silu": {"activation": "silu"},
    "gelu of a residual": {"activation": "gelu", "residual": True},
    "leaky relu of a residual": {"activation": "leaky_relu", "residual": True},
    "mask": {"mask": True, "activation": "relu", "residual": True},
}


# A batch sharded over all ranks, for gradient checkers. Every rank holds the whole batch and
# computes its own samples. Forward and backward are transposes of each other, so derivatives of any
# order equal one process's.
class _Replicate(Function):
    """Identity; the gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = _AllReduce.apply(grad)
        return total


class _AllReduce(Function):
    """Sum over ranks, on every rank; the transpose of :class:`_Replicate`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return replicate(grad)


def replicate(x: Tensor) -> Tensor:
    """Return a tensor that is the same on all ranks; its gradient is the sum over ranks."""
    y: Tensor = _Replicate.apply(x)
    return y


def scatter(whole: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return this rank's samples of a replicated batch."""
    own: Tensor = replicate(whole).split(sizes)[dist.get_rank()]
    return own


def gather(own: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return the whole batch, on every rank."""
    parts = [own.new_zeros(size, *own.shape[1:]) for size in sizes]
    parts[dist.get_rank()] = own
    whole: Tensor = _AllReduce.apply(torch.cat(parts))
    return whole


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
        # Otherwise second derivatives by some inputs would be zero.
        whole: Tensor = gather(y, sizes)
        return whole * whole

    # Every element with all options; elsewhere a random projection, in a tenth of the all-reduces.
    fast = not options.get("mask")
    return gradgradcheck(function, (x, residual, weight, bias), fast_mode=fast)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradgradcheck(pool: Pool, options: str) -> None:
    sizes = EMPTY if options in ("plain", "mask") else UNEVEN
    assert all(pool(3, "gloo").run(_gradgradcheck, sizes, OPTIONS[options]))


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
    (dx,) = grad(critic(x).sum(), x, create_graph=True)
    penalty = (dx.flatten(1).norm(dim=1) - 1).square().sum()
    inputs = [x, *critic.parameters()]
    gradients = grad(penalty, inputs, allow_unused=True)
    pairs = zip(inputs, gradients, strict=True)
    return [torch.zeros_like(t) if g is None else g for t, g in pairs]


def _hessian_vector(critic: nn.Module, x: Tensor) -> list[Tensor]:
    """The Hessian of a loss by the parameters, times a vector."""
    parameters = list(critic.parameters())
    vector = [torch.cos(torch.arange(p.numel()).double()).view_as(p) for p in parameters]
    first = grad(critic(x).square().sum(), parameters, create_graph=True)
    product = torch.stack([(g * v).sum() for g, v in zip(first, vector, strict=True)]).sum()
    return list(grad(product, [x, *parameters]))


def _third_order(critic: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of a function of second derivatives."""
    (dx,) = grad(critic(x).square().sum(), x, create_graph=True)
    (ddx,) = grad(dx.square().sum(), x, create_graph=True)
    return list(grad(ddx.square().sum(), [x, *critic.parameters()]))


# Of third order, an empty rank has another graph: torch's convolution has no second derivative of
# an empty batch, and the layers of the ranks do not match.
MEASURES: list[tuple[Callable[[nn.Module, Tensor], list[Tensor]], tuple[int, ...]]] = [
    *((_penalty, UNEVEN), (_penalty, EMPTY), (_hessian_vector, UNEVEN), (_hessian_vector, EMPTY)),
    (_third_order, UNEVEN),
]


def _batch(sizes: tuple[int, ...]) -> Tensor:
    return torch.randn(sum(sizes), 1, 6, 6, dtype=torch.float64, generator=seeded(1))


def _measure_all(rank: int) -> list[list[Tensor]]:
    return [
        measure(Critic(syncbn.SyncBatchNorm2d), _batch(sizes).split(sizes)[rank].requires_grad_())
        for measure, sizes in MEASURES
    ]


def test_equals_one_process(three_ranks: Ranks) -> None:
    answers = three_ranks.run(_measure_all)
    for i, (measure, sizes) in enumerate(MEASURES):
        expected = measure(Critic(Formula), _batch(sizes).requires_grad_())
        dx, *parameters = zip(*(answer[i] for answer in answers), strict=True)
        actual = [torch.cat(dx), *(torch.stack(shares).sum(0) for shares in parameters)]
        torch.testing.assert_close(actual, expected)
