"""Map between batch-norm classes and their synchronized forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from syncbn.nn.layer_state import LayerState
from syncbn.nn.lazy import LazySyncBatchNorm1d, LazySyncBatchNorm2d, LazySyncBatchNorm3d
from syncbn.nn.module import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

LayerClass: TypeAlias = type[_BatchNorm]

_SYNC: dict[LayerClass, LayerClass] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.LazyBatchNorm1d: LazySyncBatchNorm1d,
    nn.LazyBatchNorm2d: LazySyncBatchNorm2d,
    nn.LazyBatchNorm3d: LazySyncBatchNorm3d,
}
_ORIGINAL = {sync: original for original, sync in _SYNC.items()}
# One synchronized class per user subclass, so that layers of one class keep a common class.
_SYNC_SUBCLASSES: dict[LayerClass, LayerClass] = {}
# Names that a subclass may define without loss: the synchronized class does not define them, or
# keeps the subclass's definition.
_ALLOWED_NAMES = {
    *("__init__", "__module__", "__doc__", "__annotations__", "_check_input_dim"),
    # SyncBatchNorm's versions call super().
    *("__getattr__", "__setattr__", "__setstate__"),
    *("__static_attributes__", "__firstlineno__"),  # set by Python 3.13
}


def sync_class(original: LayerClass) -> LayerClass:
    """Return the synchronized form of a class.

    A subclass keeps its methods; ``forward`` and its helpers come from SyncBatchNorm.

    Args:
        original: class of torch, or a subclass without an :func:`unsupported_reason`.
    """
    if (known := _SYNC.get(original) or _SYNC_SUBCLASSES.get(original)) is not None:
        return known
    namespace: dict[str, Any] = {
        "_syncbn_original": original,
        "__module__": original.__module__,
        "__doc__": f"Synchronized {original.__qualname__}.",
        "__reduce_ex__": _reduce,
    }
    if original._check_input_dim is not _BatchNorm._check_input_dim:
        namespace["_check_input_dim"] = original._check_input_dim
    if issubclass(original, LazyModuleMixin):
        namespace["cls_to_become"] = sync_class(cast(LayerClass, original.cls_to_become))
    made = type(f"Sync{original.__name__}", (SyncBatchNorm, original), namespace)
    return _SYNC_SUBCLASSES.setdefault(original, made)


def original_class(sync: LayerClass) -> LayerClass | None:
    """Return the original of a synchronized class; None for a user's subclass of SyncBatchNorm."""
    original: LayerClass | None = vars(sync).get("_syncbn_original")
    return _ORIGINAL.get(sync) or original


def unsupported_reason(layer: _BatchNorm) -> str | None:
    """Return the reason why synchronizing a layer would drop behaviour; None if it would not."""
    kind = type(layer)
    name = kind.__qualname__
    if "forward" in vars(layer):
        return f"a {name} overrides forward as an attribute"
    if kind in _SYNC:
        return None
    if kind.forward is not _BatchNorm.forward:
        return f"{name} overrides forward"
    replaced = (set(vars(SyncBatchNorm)) | set(vars(LayerState))) - _ALLOWED_NAMES
    for parent in kind.__mro__:
        if parent in _SYNC or parent is _BatchNorm:
            return None
        if not _is_parametrized(parent) and (lost := sorted(replaced & set(vars(parent)))):
            return f"{parent.__qualname__} defines {', '.join(lost)}"
    return None


def change_class(layer: nn.Module, change: Callable[[LayerClass], LayerClass | None]) -> bool:
    """Replace a layer's class by the result of ``change``; return False if the result is None.

    torch gives every parametrized layer a class derived from the real one, with the parametrized
    tensors as properties. Only its base is replaced: removing the parametrization restores the
    base.
    """
    kind = cast(LayerClass, type(layer))
    base = cast(LayerClass, kind.__bases__[0]) if _is_parametrized(kind) else kind
    if (changed := change(base)) is None:
        return False
    if base is not kind:
        namespace = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        # torch's __deepcopy__ of parametrized modules would copy a live process group.
        namespace["__deepcopy__"] = SyncBatchNorm.__deepcopy__
        changed = type(kind.__name__, (changed,), namespace)
    layer.__class__ = changed
    return True


def _is_parametrized(kind: type) -> bool:
    """Return whether torch.nn.utils.parametrize created a class."""
    return kind.__module__ == parametrize.__name__


def _reduce(layer: SyncBatchNorm, protocol: Any) -> tuple[Any, ...]:
    # The class cannot be imported by name: unpickling creates it from the original class.
    return _new, (type(layer)._syncbn_original,), layer.__getstate__()


def _new(original: LayerClass) -> nn.Module:
    sync = sync_class(original)
    return sync.__new__(sync)
