"""Conversion of models: into synchronized layers and back, by changing layers' classes in place.

A layer keeps its identity, so parameters, buffers, hooks, flags, dtype, device, parametrizations
and shared references stay as they are and need no copying.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from syncbn.distributed.groups import GroupLike, resolve_group
from syncbn.nn.adapters import Adapter, Adapters, check_adapters, find_adapter, make_forward
from syncbn.nn.layer_state import LayerState
from syncbn.ops.validation import check_normalization_batch

LayerClass: TypeAlias = type[_BatchNorm]

# Names that a subclass may define without loss: the synchronized class does not define them, or
# keeps the subclass's definition.
_ALLOWED_NAMES = {
    *("__init__", "__module__", "__doc__", "__annotations__", "_check_input_dim"),
    # SyncBatchNorm's versions call super().
    *("__getattr__", "__setattr__", "__setstate__"),
    *("__static_attributes__", "__firstlineno__"),  # set by Python 3.13
}


class Conversion:
    """Conversion between batch-norm classes and their synchronized forms.

    The classes are arguments: `nn/module.py` defines them and imports this file, since
    ``SyncBatchNorm.convert_sync_batchnorm`` is a method, as in torch.

    Args:
        sync_classes: synchronized form of each class of torch. The form of ``nn.SyncBatchNorm``
            becomes the first base of the form of a user's subclass.
        new_layer: importable function that returns ``Conversion.new_layer(original, adapter)``, for
            pickles.
    """

    def __init__(
        self,
        sync_classes: dict[LayerClass, LayerClass],
        new_layer: Callable[[LayerClass, Adapter | None], nn.Module],
    ) -> None:
        self._sync = sync_classes
        self._original = {sync: original for original, sync in sync_classes.items()}
        self._base = sync_classes[nn.SyncBatchNorm]
        # One class per user subclass, so that layers of one class keep a common class.
        self._subclasses: dict[tuple[LayerClass, Adapter | None], LayerClass] = {}
        self._new_layer = new_layer

    def convert(
        self,
        model: nn.Module,
        process_group: GroupLike,
        adapters: Adapters | None = None,
        normalization_batch: int | None = None,
    ) -> None:
        """Convert the layers of a model; see :func:`syncbn.convert_sync_batchnorm`."""
        adapters = {} if adapters is None else adapters
        check_adapters(adapters)
        check_normalization_batch(normalization_batch)
        found = {layer: find_adapter(layer, adapters) for layer in model.modules()}
        group = resolve_group(process_group)
        skipped: dict[str, list[str]] = {}
        for name, layer in model.named_modules():
            adapter = found[layer]
            if adapter is None and not isinstance(layer, _BatchNorm):
                continue
            if not isinstance(layer, self._base):
                if (reason := self.unsupported_reason(layer, adapter)) is not None:
                    skipped.setdefault(reason, []).append(name or "the module")
                    continue
                # On any class but torch's, `process_group` is the user's attribute.
                is_torchs = isinstance(layer, nn.SyncBatchNorm)
                old_group = layer.__dict__.pop("process_group", None) if is_torchs else None
                if adapter is not None and old_group is None:
                    # apex and Horovod store `process_group`; mmcv and InPlaceABNSync, `group`.
                    groups = vars(layer).get("process_group"), vars(layer).get("group")
                    old_group = next((g for g in groups if isinstance(g, dist.ProcessGroup)), None)
                change_class(layer, partial(self.sync_class, adapter=adapter))
                cast(LayerState, layer)._syncbn_group = old_group
            converted = cast(LayerState, layer)
            if process_group is not None:
                converted._syncbn_group = group
            if normalization_batch is not None:
                converted._syncbn_normalization_batch = normalization_batch
            converted._syncbn_fqn = name
        for reason, names in skipped.items():
            warnings.warn(
                f"{reason}, so these layers are left unsynchronized: {', '.join(names)}. Pass "
                "adapters={TheirClass: function}, or derive the class from syncbn.SyncBatchNorm.",
                stacklevel=3,
            )

    def revert(self, model: nn.Module) -> None:
        """Restore the layers of a model; see :func:`syncbn.revert_sync_batchnorm`."""
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LayerState)]
        for name, layer in layers:
            activation = layer._syncbn_activation
            if activation is not None and self.original_class(type(layer)) is not None:
                raise ValueError(
                    f"{name or 'the module'}: got a layer with activation={activation!r}, which "
                    "torch's layers lack; call undo() of the result of syncbn.fuse() first, or use "
                    "a separate ReLU"
                )
        for _, layer in layers:
            if change_class(layer, self.original_class):
                attributes = vars(layer)
                private = [name for name in attributes if name.startswith("_syncbn_")]
                settings = {name: attributes.pop(name) for name in private}
                if isinstance(layer, nn.SyncBatchNorm):
                    layer.process_group = settings["_syncbn_group"]

    def sync_class(self, original: LayerClass, adapter: Adapter | None = None) -> LayerClass:
        """Return the synchronized form of a class.

        A subclass keeps its methods; ``forward`` and its helpers come from SyncBatchNorm.

        Args:
            original: class of torch, or a class without an :meth:`unsupported_reason`.
            adapter: function that replaces the forward of the class, or None.
        """
        key = original, adapter
        if (known := self._sync.get(original) or self._subclasses.get(key)) is not None:
            return known

        def reduce(layer: nn.Module, protocol: Any) -> tuple[Any, ...]:
            # The class cannot be imported by name: unpickling creates it from the original class.
            return self._new_layer, key, layer.__getstate__()

        namespace: dict[str, Any] = {
            "_syncbn_original": original,
            "__module__": original.__module__,
            "__doc__": f"Synchronized {original.__qualname__}.",
            "__reduce_ex__": reduce,
        }
        if adapter is not None:
            namespace["forward"] = make_forward(adapter)
        if not issubclass(original, _BatchNorm):
            # The layer may lack the setting and the batch counter that methods of batch norm use.
            namespace["track_running_stats"] = True
            for name in ("_load_from_state_dict", "extra_repr"):
                namespace[name] = getattr(original, name)
            namespace["reset_running_stats"] = _reset_running_stats
        elif original._check_input_dim is not _BatchNorm._check_input_dim:
            namespace["_check_input_dim"] = original._check_input_dim
        if issubclass(original, LazyModuleMixin):
            namespace["cls_to_become"] = self.sync_class(cast(LayerClass, original.cls_to_become))
        created = type(f"Sync{original.__name__}", (self._base, original), namespace)
        return self._subclasses.setdefault(key, created)

    def original_class(self, sync: LayerClass) -> LayerClass | None:
        """Return the original of a synchronized class; None for a user's subclass of it."""
        original: LayerClass | None = vars(sync).get("_syncbn_original")
        return self._original.get(sync) or original

    def new_layer(self, original: LayerClass, adapter: Adapter | None) -> nn.Module:
        """Return an uninitialized layer of the synchronized form of a class."""
        sync = self.sync_class(original, adapter)
        return sync.__new__(sync)

    def unsupported_reason(self, layer: nn.Module, adapter: Adapter | None) -> str | None:
        """Return why synchronizing a layer would drop behaviour; None if it would not."""
        kind = cast(LayerClass, type(layer))
        name = kind.__qualname__
        if "forward" in vars(layer):
            return f"a {name} overrides forward as an attribute"
        if kind in self._sync or adapter is not None:
            return None
        if kind.forward is not _BatchNorm.forward:
            return f"{name} overrides forward"
        replaced = (set(vars(self._base)) | set(vars(LayerState))) - _ALLOWED_NAMES
        for parent in kind.__mro__:
            if parent in self._sync or parent is _BatchNorm:
                return None
            if not _is_parametrized(parent) and (lost := sorted(replaced & set(vars(parent)))):
                return f"{parent.__qualname__} defines {', '.join(lost)}"
        return None


def _reset_running_stats(layer: _BatchNorm) -> None:
    """Reset the statistics of a layer that may have no batch counter, as torch's method does."""
    for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
        if (buffer := layer._buffers.get(name)) is not None:
            buffer.fill_(value)


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
        namespace["__deepcopy__"] = LayerState.__deepcopy__
        changed = type(kind.__name__, (changed,), namespace)
    layer.__class__ = changed
    return True


def _is_parametrized(kind: type) -> bool:
    """Return whether torch.nn.utils.parametrize created a class."""
    return kind.__module__ == parametrize.__name__
