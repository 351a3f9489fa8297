"""Gradient accumulation: the running statistics of a step are those of all its micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from syncbn.kernels import Running
from syncbn.kernels.reference import move_running
from syncbn.module import SyncBatchNorm
from syncbn.moments import Moments, get_packed_size


@contextmanager
def accumulate_statistics(model: nn.Module) -> Iterator[None]:
    """Move running averages once, at the end of the body, by the union of the batches in it.

    Without it every micro-batch of a step moves them, each by its own statistics: with k
    micro-batches as ``1 - (1 - momentum)^k`` would, and with variances that lack what lies between
    micro-batches. In the body each is still normalized with its own statistics (over all ranks):
    the others are not known yet. If the body raises, the averages stay as they were.

    Args:
        model: whose synchronized layers, in training and with running averages, are meant.

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
    if any(layer.pending_moments is not None for layer in layers):
        raise ValueError("accumulate_statistics() is already at work on layers of this model")
    counting = [layer for layer in layers if layer.track_running_stats]
    try:
        for layer in counting:
            layer.pending_moments = _nothing(layer)
        yield
        for layer in counting:
            mean, var, tracked = layer.running_mean, layer.running_var, layer.num_batches_tracked
            if layer.pending_moments is not None:
                moments = Moments.unpack(layer.pending_moments, layer.num_features)
                move_running(moments, Running(mean, var, tracked, layer.momentum))
    finally:
        for layer in counting:
            layer.__dict__.pop("pending_moments", None)


def _nothing(layer: SyncBatchNorm) -> Tensor:
    """Return the moments of no values, where the layer's averages are."""
    buffers = list(layer.buffers())
    if any(map(is_lazy, buffers)):
        raise ValueError(
            f"{layer.sync_name or type(layer).__name__}: has no sizes yet; run it once before "
            "accumulate_statistics()"
        )
    size = get_packed_size(layer.num_features, buffers[0].dtype)
    return torch.zeros(size, dtype=torch.float64, device=buffers[0].device)
