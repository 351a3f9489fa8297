"""Gradient accumulation: the running statistics of a step are those of all its micro-batches."""

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
    """Move running averages once, at the end of the body, by the union of the batches in it.

    Without it every micro-batch of a step moves them, each by its own statistics: with k
    micro-batches as ``1 - (1 - momentum)^k`` would, and with variances that lack what lies between
    micro-batches. In the body each is still normalized with its own statistics (over all ranks):
    the others are not known yet. If the body raises, the averages stay as they were.

    Args:
        model: whose synchronized layers, in training and with running averages, are meant. Layers
            whose buffers were removed are left alone.

    Raises:
        ValueError: there is no synchronized layer, or one is in the body of another call.

    Example::

        with syncbn.accumulate_statistics(model):
            for images, labels in micro_batches:
                criterion(model(images), labels).backward()
        optimizer.step()
    """
    layers = [layer for layer in model.modules() if isinstance(layer, SyncBatchNorm)]
    if not layers:
        raise ValueError(
            f"got a {type(model).__name__} without synchronized layers; expected one that "
            "convert_sync_batchnorm() has converted"
        )
    if any(layer._syncbn_pending is not None for layer in layers):
        raise ValueError("accumulate_statistics() is already at work on layers of this model")
    counting = [layer for layer in layers if layer.track_running_stats and _averages(layer)]
    try:
        for layer in counting:
            layer._syncbn_pending = _nothing(layer)
        yield
        for layer in counting:
            if layer._syncbn_pending is not None:
                _, _, mean, var, tracked = layer_tensors(layer)
                moments = Moments.unpack(layer._syncbn_pending, layer_channels(layer))
                update_running_stats(moments, RunningStats(mean, var, tracked, layer.momentum))
    finally:
        for layer in counting:
            layer.__dict__.pop("_syncbn_pending", None)


def _averages(layer: SyncBatchNorm) -> list[Tensor]:
    """Return the running statistics and the counter that a layer has."""
    return [tensor for tensor in layer_tensors(layer)[2:] if tensor is not None]


def _nothing(layer: SyncBatchNorm) -> Tensor:
    """Return the moments of no values, on the device of the layer's averages."""
    averages = _averages(layer)
    if any(map(is_lazy, averages)):
        raise ValueError(
            f"{layer._syncbn_name or type(layer).__name__}: has no sizes yet; run it once before "
            "accumulate_statistics()"
        )
    size = get_packed_size(layer_channels(layer), averages[0].dtype)
    return torch.zeros(size, dtype=torch.float64, device=averages[0].device)
