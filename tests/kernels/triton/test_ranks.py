"""Gradients of a group of ranks with the Triton kernel: a residual, a ReLU, frozen inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import syncbn
from tests.kernel_cases import device_of
from tests.ranks import Ranks

DEVICE = device_of("triton")
SHAPES = [(3, 4, 5, 3), (2, 4, 5, 3), (0, 4, 5, 3)]


def _gradients(rank: int, impl: str, differentiated: str) -> list[Tensor | None]:
    torch.manual_seed(rank)
    layer = syncbn.SyncBatchNorm2d(4, activation="relu").to(DEVICE)
    layer.impl = impl
    x, residual, dy = torch.randn(3, *SHAPES[rank], device=DEVICE)
    before = dy.clone()
    x.requires_grad_(differentiated.startswith("x"))
    residual.requires_grad_("residual" in differentiated)
    layer(x, residual).backward(dy)
    assert torch.equal(dy, before)
    return [t.grad for t in (x, residual, layer.weight, layer.bias)]


@pytest.mark.parametrize("differentiated", ["x, residual", "x", "residual", "nothing"])
def test_gradients_of_a_group(three_ranks: Ranks, differentiated: str) -> None:
    """One rank has no values."""
    found = three_ranks.run(_gradients, "triton", differentiated)
    expected = three_ranks.run(_gradients, "reference", differentiated)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
