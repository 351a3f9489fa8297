"""Gradients of a group of ranks with the Triton kernel: a residual, a ReLU, frozen inputs."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

import syncbn
from tests.kernel_cases import device_of
from tests.ranks import Pool

DEVICE = device_of("triton")
SHAPES = [(3, 4, 5, 3), (2, 4, 5, 3), (0, 4, 5, 3)]


def _gradients(rank: int, impl: str) -> list[Tensor | None]:
    gradients: list[Tensor | None] = []
    for needs_x, needs_residual in product((True, False), repeat=2):
        torch.manual_seed(rank)
        layer = syncbn.SyncBatchNorm2d(4, activation="relu").to(DEVICE)
        layer.impl = impl
        x, residual, dy = torch.randn(3, *SHAPES[rank], device=DEVICE)
        before = dy.clone()
        x.requires_grad_(needs_x)
        residual.requires_grad_(needs_residual)
        layer(x, residual).backward(dy)
        assert torch.equal(dy, before)
        gradients += [t.grad for t in (x, residual, layer.weight, layer.bias)]
    return gradients


def test_gradients_of_a_group(pool: Pool) -> None:
    """One rank has no values."""
    actual, expected = (pool(3, "gloo").run(_gradients, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
