"""Into the synchronized layers and back, by changing the class of the layers where they are.

A layer keeps its identity, so parameters, buffers, hooks, flags, dtype, device, parametrizations
and every reference to it, shared ones included, stay as they are without being copied.
"""

from __future__ import annotations

import warnings
from typing import TypeVar, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.distributed.groups import GroupLike, resolve_group
from syncbn.nn import class_map as adopt
from syncbn.nn.module import SyncBatchNorm

M = TypeVar("M", bound=nn.Module)


def convert_sync_batchnorm(module: M, process_group: GroupLike = None) -> M:
    """Make every batch-norm layer of a model synchronized, in place.

    Converted are ``nn.BatchNorm1d/2d/3d``, their lazy forms, ``nn.SyncBatchNorm``, and subclasses
    of ``nn.BatchNorm*`` that inherit ``forward``; such a layer stays an instance of its class.
    Layers that are synchronized already get the group and their name. A layer with a ``forward`` of
    its own, or with other methods that synchronization would replace, does something this library
    does not know: it is left alone, with a warning. :func:`revert_sync_batchnorm` is the exact
    inverse.

    Args:
        module: the model, or a single layer.
        process_group: the ranks whose batches count as one: None (all ranks; layers that have a
            group keep it), "world", "node", a number of consecutive ranks, a one-dimensional
            ``DeviceMesh``, or a process group. "node" and numbers create a group, so every rank
            must call this.

    Returns:
        The module it was given.

    Raises:
        ValueError: the group is not valid; see :func:`syncbn.distributed.resolve_group`.
        RuntimeError: a group is to be created and torch.distributed is not initialized.
    """
    group = resolve_group(process_group)
    left_alone: dict[str, list[str]] = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if not isinstance(layer, SyncBatchNorm):
            if (reason := adopt.obstacle(layer)) is not None:
                left_alone.setdefault(reason, []).append(name or "the module")
                continue
            # Of torch's own layer: in any other, such an attribute is the user's.
            is_torchs = isinstance(layer, nn.SyncBatchNorm)
            own_group = layer.__dict__.pop("process_group", None) if is_torchs else None
            adopt.change_class(layer, adopt.synchronized)
            cast(SyncBatchNorm, layer)._syncbn_group = own_group
        converted = cast(SyncBatchNorm, layer)
        if process_group is not None:
            converted._syncbn_group = group
        converted._syncbn_name = name
    for reason, names in left_alone.items():
        warnings.warn(
            f"{reason}, so these layers are left unsynchronized: {', '.join(names)}. Derive the "
            "class from syncbn.SyncBatchNorm to synchronize them.",
            stacklevel=2,
        )
    return module


def revert_sync_batchnorm(module: M) -> M:
    """Give every synchronized layer of a model its original class back, in place.

    Layers built as ``syncbn.SyncBatchNorm1d/2d/3d`` become ``nn.BatchNorm1d/2d/3d``; a
    ``syncbn.SyncBatchNorm``, which takes any number of dimensions, becomes ``nn.SyncBatchNorm`` and
    keeps the group it has. A subclass of ours that a user wrote has no original and stays.

    Args:
        module: the model, or a single layer.

    Returns:
        The module it was given.

    Raises:
        ValueError: a layer applies an activation, which torch's layers do not; nothing is changed.
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, SyncBatchNorm) or layer._syncbn_activation is None:
            continue
        if adopt.original(type(layer)) is not None:
            raise ValueError(
                f"{name or 'the module'}: got a layer with "
                f"activation={layer._syncbn_activation!r}, which "
                "torch's layers do not have; undo() what syncbn.fuse() returned, or use a ReLU "
                "of its own, before"
            )
    for layer in module.modules():
        if isinstance(layer, SyncBatchNorm) and adopt.change_class(layer, adopt.original):
            own = vars(layer)
            settings = {k: own.pop(k) for k in list(own) if k.startswith("_syncbn_")}
            if isinstance(layer, nn.SyncBatchNorm):
                layer.process_group = settings["_syncbn_group"]
    return module
