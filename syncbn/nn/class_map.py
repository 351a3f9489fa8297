"""Which class a batch-norm layer becomes when it is synchronized, and which it was."""

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

_SYNCHRONIZED: dict[LayerClass, LayerClass] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.LazyBatchNorm1d: LazySyncBatchNorm1d,
    nn.LazyBatchNorm2d: LazySyncBatchNorm2d,
    nn.LazyBatchNorm3d: LazySyncBatchNorm3d,
}
_ORIGINAL = {ours: theirs for theirs, ours in _SYNCHRONIZED.items()}
# One synchronized class for each subclass met, so that layers of one class stay of one class.
_ADOPTED: dict[LayerClass, LayerClass] = {}
# What a subclass may define besides: the synchronized class does not have it, or takes its version.
_HARMLESS = {
    *("__init__", "__module__", "__doc__", "__annotations__", "_check_input_dim"),
    # SyncBatchNorm's versions call the next class's.
    *("__getattr__", "__setattr__", "__setstate__"),
    *("__static_attributes__", "__firstlineno__"),  # set by Python 3.13
}


def synchronized(original: LayerClass) -> LayerClass:
    """Return the synchronized form of a class of torch, or of a subclass without :func:`obstacle`.

    A subclass keeps its methods; ``forward`` and what belongs to it come from SyncBatchNorm.
    """
    if (known := _SYNCHRONIZED.get(original) or _ADOPTED.get(original)) is not None:
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
        namespace["cls_to_become"] = synchronized(cast(LayerClass, original.cls_to_become))
    adopted = type(f"Sync{original.__name__}", (SyncBatchNorm, original), namespace)
    return _ADOPTED.setdefault(original, adopted)


def original(synchronized: LayerClass) -> LayerClass | None:
    """Return the class that a synchronized one was made from; None for a user's own subclass."""
    found: LayerClass | None = vars(synchronized).get("_syncbn_original")
    return _ORIGINAL.get(synchronized) or found


def obstacle(layer: _BatchNorm) -> str | None:
    """Return why synchronizing a layer would drop behaviour of it, or None if it would not."""
    kind = type(layer)
    name = kind.__qualname__
    if "forward" in vars(layer):
        return f"a {name} has a forward of its own"
    if kind in _SYNCHRONIZED:
        return None
    if kind.forward is not _BatchNorm.forward:
        return f"{name} overrides forward"
    ours = (set(vars(SyncBatchNorm)) | set(vars(LayerState))) - _HARMLESS
    for parent in kind.__mro__:
        if parent in _SYNCHRONIZED or parent is _BatchNorm:
            return None
        if not _is_parametrized(parent) and (taken := sorted(ours & set(vars(parent)))):
            return f"{parent.__qualname__} defines {', '.join(taken)}"
    return None


def change_class(layer: nn.Module, change: Callable[[LayerClass], LayerClass | None]) -> bool:
    """Give a layer the class that ``change`` returns for its class; return whether there is one.

    A parametrized layer is of a class that torch made for it alone, derived from its real one and
    holding the properties; only the class beneath is changed, which is where torch looks for it
    when the parametrization is removed.
    """
    kind = cast(LayerClass, type(layer))
    beneath = cast(LayerClass, kind.__bases__[0]) if _is_parametrized(kind) else kind
    if (changed := change(beneath)) is None:
        return False
    if beneath is not kind:
        namespace = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        # Ours copies any module; torch's own would try to copy a live process group.
        namespace["__deepcopy__"] = SyncBatchNorm.__deepcopy__
        changed = type(kind.__name__, (changed,), namespace)
    layer.__class__ = changed
    return True


def _is_parametrized(kind: type) -> bool:
    """Return whether torch.nn.utils.parametrize made a class."""
    return kind.__module__ == parametrize.__name__


def _reduce(layer: SyncBatchNorm, protocol: Any) -> tuple[Any, ...]:
    # The class has no name to import it by: it is made again from the original.
    return _new, (type(layer)._syncbn_original,), layer.__getstate__()


def _new(original: LayerClass) -> nn.Module:
    adopted = synchronized(original)
    return adopted.__new__(adopted)
