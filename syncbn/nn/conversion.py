"""Conversion of models: into synchronized layers and back, by changing layers' classes in place.

A layer keeps its identity, so parameters, buffers, hooks, flags, dtype, device, parametrizations
and shared references stay as they are and need no copying.
"""

from __future__ import annotations

import warnings
from typing import TypeVar, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.distributed.groups import GroupLike, resolve_group
from syncbn.nn.class_map import change_class, original_class, sync_class, unsupported_reason
from syncbn.nn.module import SyncBatchNorm

M = TypeVar("M", bound=nn.Module)


def convert_sync_batchnorm(module: M, process_group: GroupLike = None) -> M:
    """Make every batch-norm layer of a model synchronized, in place.

    Converts ``nn.BatchNorm1d/2d/3d``, their lazy forms, ``nn.SyncBatchNorm``, and subclasses of
    ``nn.BatchNorm*`` that inherit ``forward``; a converted subclass stays an instance of its class.
    Synchronized layers get the group and their name. A layer that overrides ``forward`` or other
    methods that synchronization replaces would lose behaviour: it is left alone, with a warning.
    :func:`revert_sync_batchnorm` is the exact inverse.

    Args:
        module: a model or a single layer.
        process_group: ranks whose batches form one batch: None (all ranks; layers with a group keep
            it), "world", "node", a number of consecutive ranks, a one-dimensional ``DeviceMesh``,
            or a process group. "node" and numbers create a group, so every rank must call this.

    Returns:
        The same module.

    Raises:
        ValueError: the group is not valid; see :func:`syncbn.distributed.resolve_group`.
        RuntimeError: torch.distributed must create a group and is not initialized.
    """
    group = resolve_group(process_group)
    skipped: dict[str, list[str]] = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if not isinstance(layer, SyncBatchNorm):
            if (reason := unsupported_reason(layer)) is not None:
                skipped.setdefault(reason, []).append(name or "the module")
                continue
            # On any class but torch's, `process_group` is the user's attribute.
            is_torchs = isinstance(layer, nn.SyncBatchNorm)
            torchs_group = layer.__dict__.pop("process_group", None) if is_torchs else None
            change_class(layer, sync_class)
            cast(SyncBatchNorm, layer)._syncbn_group = torchs_group
        converted = cast(SyncBatchNorm, layer)
        if process_group is not None:
            converted._syncbn_group = group
        converted._syncbn_fqn = name
    for reason, names in skipped.items():
        warnings.warn(
            f"{reason}, so these layers are left unsynchronized: {', '.join(names)}. Derive the "
            "class from syncbn.SyncBatchNorm to synchronize them.",
            stacklevel=2,
        )
    return module


def revert_sync_batchnorm(module: M) -> M:
    """Restore the original class of every synchronized layer of a model, in place.

    Layers built as ``syncbn.SyncBatchNorm1d/2d/3d`` become ``nn.BatchNorm1d/2d/3d``. A
    ``syncbn.SyncBatchNorm``, which accepts any number of dimensions, becomes ``nn.SyncBatchNorm``
    and keeps its group. A user's subclass of these classes has no original and stays.

    Args:
        module: a model or a single layer.

    Returns:
        The same module.

    Raises:
        ValueError: a layer has an activation, which torch's layers lack; no layer was changed.
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, SyncBatchNorm) or layer._syncbn_activation is None:
            continue
        if original_class(type(layer)) is not None:
            raise ValueError(
                f"{name or 'the module'}: got a layer with "
                f"activation={layer._syncbn_activation!r}, which torch's layers lack; call undo() "
                "of the result of syncbn.fuse() first, or use a separate ReLU"
            )
    for layer in module.modules():
        if isinstance(layer, SyncBatchNorm) and change_class(layer, original_class):
            attributes = vars(layer)
            private = [name for name in attributes if name.startswith("_syncbn_")]
            settings = {name: attributes.pop(name) for name in private}
            if isinstance(layer, nn.SyncBatchNorm):
                layer.process_group = settings["_syncbn_group"]
    return module
