"""What tests on a GPU share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from syncbn.kernels import Running, choose
from syncbn.ops.batch_norm import Call, normalize

CUDA = torch.device("cuda")
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Layer: TypeAlias = Callable[..., Tensor]


def talking(layer: syncbn.SyncBatchNorm, group: dist.ProcessGroup) -> Layer:
    """Return the layer in training, which sends messages in the group."""

    def normalized(x: Tensor, residual: Tensor | None = None) -> Tensor:
        running = Running(
            layer.running_mean, layer.running_var, layer.num_batches_tracked, layer.momentum
        )
        relu, kernel = layer.activation == "relu", choose("triton", x)
        call = Call(layer.eps, relu, running, group, kernel, "layer")
        return normalize(x, layer.weight, layer.bias, residual, None, call)

    return normalized


def step(
    layer: syncbn.SyncBatchNorm,
    x: Tensor,
    dy: Tensor,
    residual: bool = False,
    forward: Layer | None = None,
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call that runs forward, of the layer if nothing else is said, and backward."""

    def run() -> tuple[Tensor, ...]:
        # A residual that has other values when a graph is replayed, too.
        y = (forward or layer)(x, *([x * 2 - 1] if residual else []))
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)

    return run


def case(samples: int = 4) -> tuple[syncbn.SyncBatchNorm, Tensor, Tensor]:
    layer = syncbn.SyncBatchNorm2d(64, activation="relu").to(CUDA)
    x, dy = torch.randn(2, samples, 64, 32, 32, device=CUDA)
    return layer, x.requires_grad_(), dy
