"""Training-mode forwards that leave the running statistics alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from syncbn.nn.bn_layers import named_batch_norms


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Leave running statistics and batch counters unchanged by the forwards of the body.

    For a forward that must not count: a probe of the loss, the second forward of a
    sharpness-aware step, an adversarial example, a recomputation that
    :func:`syncbn.checkpoint_contexts` cannot reach. Layers in training mode still normalize with
    their batch, over all ranks; gradients are unchanged. In the body
    :func:`syncbn.accumulate_statistics` does not accumulate.

    The context sets ``track_running_stats`` of every batch-norm layer to False, and restores it at
    the end. So it serves torch's layers, too; compiled models compile once more; and a copy of the
    model that is made in the body keeps the frozen layers.

    Args:
        model: module with batch-norm layers: ``nn.BatchNorm*``, ``nn.SyncBatchNorm`` or this
            library's.

    Raises:
        ValueError: the model has no batch-norm layer.

    Example::

        with syncbn.frozen_statistics(model):
            perturbed_loss = criterion(model(images), labels)
    """
    layers = [layer for _, layer in named_batch_norms(model)]
    settings = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, setting in zip(layers, settings, strict=True):
            layer.track_running_stats = setting
