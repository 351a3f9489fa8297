"""Selection of the layers to calibrate by name, module or training mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.bn_layers import BNLayer, named_batch_norms, plain_name, require_running_stats

#: Module, dotted name in the plain model, or a list of both. Each includes the layers within it.
Modules: TypeAlias = str | nn.Module | Iterable[str | nn.Module]

_MAX_NAMES = 8


class Selection(NamedTuple):
    """Batch-norm layers of a model by their treatment.

    Attributes:
        layers: layers to calibrate.
        left_alone: remaining layers by name.
    """

    layers: list[BNLayer]
    left_alone: dict[str, _BatchNorm]


def select_layers(
    model: nn.Module, layers: Modules | None = None, skip: Modules | None = None
) -> Selection:
    """Return the layers to calibrate and the layers to leave alone.

    If some batch-norm layers are in training mode, the layers in evaluation mode are frozen and
    left alone. If all are in the same mode, all are calibrated. ``layers`` replaces this rule;
    ``skip`` excludes layers from either choice.

    Args:
        model: network, wrapped or not.
        layers: modules to calibrate; None for the rule.
        skip: modules to leave alone.

    Raises:
        TypeError: an entry is neither a name nor a module.
        ValueError: an entry contains no batch-norm layer of the model; no layer remains; a layer
            to calibrate has no usable statistics or shares a buffer with another layer.
    """
    norms = named_batch_norms(model)
    included = None if layers is None else _find_norms("layers", layers, model)
    skipped = set() if skip is None else _find_norms("skip", skip, model)
    partly_frozen = len({module.training for _, module in norms}) > 1
    chosen: list[BNLayer] = []
    left_alone: dict[str, _BatchNorm] = {}
    for name, module in norms:
        excluded = module in skipped or (included is not None and module not in included)
        # A forward would initialize an excluded lazy layer, and so change the model.
        if not excluded or isinstance(module.running_mean, nn.UninitializedBuffer):
            require_running_stats(name, module)
        if excluded or (included is None and partly_frozen and not module.training):
            left_alone[name] = module
        else:
            chosen.append(BNLayer(len(chosen), name, module))
    if not chosen:
        raise ValueError(
            f"all {len(norms)} batch-norm layers are left alone; expected one to calibrate: name "
            "it in layers=, skip fewer, or put it into training mode"
        )
    _require_separate_buffers(chosen, left_alone)
    return Selection(chosen, left_alone)


def _find_norms(argument: str, entries: Modules, model: nn.Module) -> set[_BatchNorm]:
    if isinstance(entries, str | nn.Module) or not isinstance(entries, Iterable):
        entries = [entries]
    by_name: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        by_name.setdefault(plain_name(name, model), module)
    inside = set(model.modules())
    result: set[_BatchNorm] = set()
    for entry in entries:
        if not isinstance(entry, str | nn.Module):
            raise TypeError(
                f"{argument}: got {entry!r} of type {type(entry).__name__}; expected the name of a "
                "module, a module, or several of them"
            )
        module = by_name.get(entry) if isinstance(entry, str) else entry
        below = [] if module is None else [m for m in module.modules() if isinstance(m, _BatchNorm)]
        if not below or not inside.issuperset(below):
            shown = repr(entry) if isinstance(entry, str) else f"a {type(entry).__name__}"
            names = _shorten(named_batch_norms(model))
            raise ValueError(
                f"{argument}: got {shown}, which is no module of the model with a batch-norm layer "
                f"in it; expected layers, or modules above them: {names}"
            )
        result.update(below)
    return result


def _shorten(norms: list[tuple[str, _BatchNorm]]) -> str:
    more = f" and {len(norms) - _MAX_NAMES} more" if len(norms) > _MAX_NAMES else ""
    return ", ".join(repr(name) for name, _ in norms[:_MAX_NAMES]) + more


def _require_separate_buffers(chosen: list[BNLayer], left_alone: dict[str, _BatchNorm]) -> None:
    """Raise if a buffer of a layer to calibrate shares memory with another buffer.

    Elements are compared, not storages: buffers may be columns of one tensor.
    """
    named = [(layer.name, layer.module) for layer in chosen] + list(left_alone.items())
    owners: dict[int, str] = {}
    for index, (name, module) in enumerate(named):
        for kind in ("running_mean", "running_var"):
            if (buffer := getattr(module, kind)) is None:
                continue
            path = f"{name}.{kind}".lstrip(".")
            for address in _addresses(buffer):
                if address in owners:
                    raise ValueError(
                        f"{owners[address]} and {path} share memory, so the statistics of one "
                        "would overwrite the other; expected separate buffers (such as "
                        "buffer.clone())"
                    )
            if index < len(chosen):
                owners.update(dict.fromkeys(_addresses(buffer), path))


def _addresses(buffer: Tensor) -> range:
    """Return the address of every element of a buffer ``[C]``."""
    step = max(buffer.stride(0) * buffer.element_size(), 1)
    return range(buffer.data_ptr(), buffer.data_ptr() + step * buffer.numel(), step)
