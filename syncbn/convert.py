"""Into the synchronized layers and back, by changing the class of the layers where they are.

A layer keeps its identity, so parameters, buffers, hooks, flags, dtype, device, parametrizations
and every reference to it, shared ones included, stay as they are without being copied.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.distributed.groups import GroupLike, resolve_group
from syncbn.lazy import LazySyncBatchNorm1d, LazySyncBatchNorm2d, LazySyncBatchNorm3d
from syncbn.module import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

M = TypeVar("M", bound=nn.Module)

_SYNCHRONIZED: dict[type[_BatchNorm], type[SyncBatchNorm]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.LazyBatchNorm1d: LazySyncBatchNorm1d,
    nn.LazyBatchNorm2d: LazySyncBatchNorm2d,
    nn.LazyBatchNorm3d: LazySyncBatchNorm3d,
}
# One synchronized class for each subclass met, so that layers of one class stay of one class.
_ADOPTED: dict[type[_BatchNorm], type[SyncBatchNorm]] = {}
_ORIGINAL = {ours: theirs for theirs, ours in _SYNCHRONIZED.items()}


def convert_sync_batchnorm(module: M, process_group: GroupLike = None) -> M:
    """Make every batch-norm layer of a model synchronized, in place.

    Converted are ``nn.BatchNorm1d/2d/3d``, ``nn.SyncBatchNorm``, their lazy forms, and subclasses
    of them that inherit ``forward`` (such a layer stays an instance of its class). A layer whose
    ``forward`` is its own does something this library does not know: it is left alone, with a
    warning. :func:`revert_sync_batchnorm` is the exact inverse.

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
            if _has_own_forward(layer):
                left_alone.setdefault(type(layer).__qualname__, []).append(name or "the module")
                continue
            layer.__dict__.setdefault("process_group", None)
            layer.__class__ = _SYNCHRONIZED.get(type(layer)) or _adopt(type(layer))
        synchronized = cast(SyncBatchNorm, layer)
        if process_group is not None:
            synchronized.process_group = group
        synchronized.layer_name = name
    for kind, names in left_alone.items():
        warnings.warn(
            f"{kind} overrides forward, so these layers are left unsynchronized: "
            f"{', '.join(names)}. Derive them from syncbn.SyncBatchNorm to synchronize them.",
            stacklevel=2,
        )
    return module


def revert_sync_batchnorm(module: M) -> M:
    """Give every synchronized layer of a model its original class back, in place.

    Layers built as ``syncbn.SyncBatchNorm1d/2d/3d`` become ``nn.BatchNorm1d/2d/3d``; a
    ``syncbn.SyncBatchNorm``, which takes any number of dimensions, becomes ``nn.SyncBatchNorm``.

    Args:
        module: the model, or a single layer.

    Returns:
        The module it was given.
    """
    for layer in module.modules():
        if not isinstance(layer, SyncBatchNorm):
            continue
        original = original_class(type(layer))
        if original is None:
            continue
        cast(nn.Module, layer).__class__ = original
        for attribute in ("layer_name", "kernel"):
            layer.__dict__.pop(attribute, None)
        if not issubclass(original, nn.SyncBatchNorm):
            layer.__dict__.pop("process_group", None)
    return module


def original_class(synchronized: type[SyncBatchNorm]) -> type[_BatchNorm] | None:
    """Return the class a synchronized class stands for, or None for a user's own subclass."""
    return _ORIGINAL.get(synchronized) or synchronized.__dict__.get("original_class")


def _has_own_forward(layer: nn.Module) -> bool:
    known = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return "forward" in layer.__dict__ or type(layer).forward not in known


def _adopt(original: type[_BatchNorm]) -> type[SyncBatchNorm]:
    """Return the synchronized form of a subclass: its own methods stay, ``forward`` is ours."""
    if original in _ADOPTED:
        return _ADOPTED[original]
    namespace: dict[str, Any] = {
        "original_class": original,
        "__module__": original.__module__,
        "__doc__": f"Synchronized {original.__qualname__}.",
        "__reduce_ex__": _reduce_adopted,
    }
    if original._check_input_dim is not _BatchNorm._check_input_dim:
        namespace["_check_input_dim"] = original._check_input_dim
    adopted = type(f"Sync{original.__name__}", (SyncBatchNorm, original), namespace)
    return _ADOPTED.setdefault(original, adopted)


def _reduce_adopted(layer: SyncBatchNorm, protocol: Any) -> tuple[Any, ...]:
    # The class has no name to import it by: it is made again from the original.
    return _new_adopted, (original_class(type(layer)),), layer.__getstate__()


def _new_adopted(original: type[_BatchNorm]) -> SyncBatchNorm:
    adopted = _adopt(original)
    return adopted.__new__(adopted)
