"""Steps of a layer on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from syncbn.kernels.base import RunningStats
from syncbn.ops.functional import batch_norm

CUDA = torch.device("cuda")
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Layer: TypeAlias = Callable[..., Tensor]


def communicate(layer: syncbn.SyncBatchNorm, group: dist.ProcessGroup) -> Layer:
    """Return the forward pass of a layer in training with all-reduces, even for world size 1."""

    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
        running = RunningStats(
            layer.running_mean, layer.running_var, layer.num_batches_tracked, layer.momentum
        )
        return batch_norm(
            x,
            layer.weight,
            layer.bias,
            running,
            layer.eps,
            group,
            use_batch_stats=True,
            residual=residual,
            activation=layer.activation,
            mask=None,
            impl="triton",
            label="layer",
        )

    return forward


def make_step(
    layer: syncbn.SyncBatchNorm,
    x: Tensor,
    dy: Tensor,
    residual: bool = False,
    forward: Layer | None = None,
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call of forward and backward, which returns the output and all gradients.

    Args:
        layer: layer in training.
        x: input, shape ``[N, C, *]``, a leaf.
        dy: gradient of the output, shape of x.
        residual: True to add a function of x.
        forward: forward pass; None for the layer's.
    """

    def step() -> tuple[Tensor, ...]:
        # Computed from x: the replay of a graph must see new values.
        y = (forward or layer)(x, *([x * 2 - 1] if residual else []))
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)

    return step


def check_synchronization(run: Callable[[], object]) -> None:
    """Raise an error if the second call of a step synchronizes with the device."""
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_layer(samples: int = 4) -> tuple[syncbn.SyncBatchNorm, Tensor, Tensor]:
    """Return a layer, its input and the gradient of its output."""
    layer = syncbn.SyncBatchNorm2d(64, activation="relu").to(CUDA)
    x, dy = torch.randn(2, samples, 64, 32, 32, device=CUDA)
    return layer, x.requires_grad_(), dy
