"""Gradient accumulation: one update of the running statistics per step of several micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from syncbn.kernels.base import RunningStats
from syncbn.kernels.reference import update_running_stats
from syncbn.moments import Moments, get_packed_size
from syncbn.nn.layer_state import layer_channels, layer_tensors
from syncbn.nn.module import SyncBatchNorm


@contextmanager
def accumulate_statistics(model: nn.Module) -> Iterator[None]:
    """Update running statistics once, when the body ends, from the union of its micro-batches.

    Without this context every micro-batch updates them with its own statistics: k micro-batches act
    like the momentum ``1 - (1 - momentum)^k``, and the variances lack the variance between
    micro-batches. In the body, each micro-batch is still normalized with its own statistics over
    all ranks, because later micro-batches have not run yet. If the body raises, the running
    statistics stay unchanged.

    Args:
        model: module with synchronized layers; its layers in training mode with running statistics
            accumulate. Layers whose buffers were removed are left alone.

    Raises:
        ValueError: the model has no synchronized layer, or a layer is already accumulating.

    Example::

        with syncbn.accumulate_statistics(model):
            for images, labels in micro_batches:
                criterion(model(images), labels).backward()
        optimizer.step()
    """
    layers = [layer for layer in model.modules() if isinstance(layer, SyncBatchNorm)]
    if not layers:
        raise ValueError(
            f"got a {type(model).__name__} without synchronized layers; expected a model that "
            "convert_sync_batchnorm() has converted"
        )
    if any(layer._syncbn_pending is not None for layer in layers):
        raise ValueError("accumulate_statistics() is already active for layers of this model")
    layers = [layer for layer in layers if layer.track_running_stats and _running_stats(layer)]
    try:
        for layer in layers:
            layer._syncbn_pending = _empty_moments(layer)
        yield
        for layer in layers:
            if layer._syncbn_pending is not None:
                _, _, mean, var, tracked = layer_tensors(layer)
                moments = Moments.unpack(layer._syncbn_pending, layer_channels(layer))
                update_running_stats(moments, RunningStats(mean, var, tracked, layer.momentum))
    finally:
        for layer in layers:
            layer.__dict__.pop("_syncbn_pending", None)


def _running_stats(layer: SyncBatchNorm) -> list[Tensor]:
    """Return the existing ones of running mean, running variance and batch counter."""
    return [tensor for tensor in layer_tensors(layer)[2:] if tensor is not None]


def _empty_moments(layer: SyncBatchNorm) -> Tensor:
    """Return packed moments of zero values on the device of the running statistics."""
    running = _running_stats(layer)
    if any(map(is_lazy, running)):
        raise ValueError(
            f"{layer._syncbn_fqn or type(layer).__name__}: has no sizes yet; run it once before "
            "accumulate_statistics()"
        )
    size = get_packed_size(layer_channels(layer), running[0].dtype)
    return torch.zeros(size, dtype=torch.float64, device=running[0].device)
