"""Private attributes of a synchronized layer, its copies and pickles, and its call."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from syncbn.distributed.groups import active_group
from syncbn.kernels import IMPLS, unknown_impl
from syncbn.kernels.activations import ActivationName
from syncbn.kernels.base import RunningStats
from syncbn.ops.functional import batch_norm
from syncbn.ops.validation import check_activation, check_normalization_batch

# Public attributes and the private attributes that the library reads. A converted layer may carry
# attributes under the public names; they keep their values and their meaning.
_PRIVATE = {
    "activation": "_syncbn_activation",
    "negative_slope": "_syncbn_negative_slope",
    "process_group": "_syncbn_group",
    "impl": "_syncbn_impl",
    "normalization_batch": "_syncbn_normalization_batch",
    "fqn": "_syncbn_fqn",
}


@dataclass(frozen=True)
class DetachedGroup:
    """Description of a process group in a pickle: a live group cannot leave its process.

    Attributes:
        ranks: global ranks that were in the group; none if it had been destroyed.
    """

    ranks: tuple[int, ...]


class LayerState(_BatchNorm):
    """Attributes of a synchronized layer: their storage, copies and pickles.

    The library reads only private attributes that it has set itself. A converted layer may carry
    attributes of any other name.
    """

    process_group: dist.ProcessGroup | DetachedGroup | None
    impl: str
    normalization_batch: int | None
    fqn: str
    activation: ActivationName | None
    negative_slope: float
    _syncbn_group: dist.ProcessGroup | DetachedGroup | None = None
    _syncbn_impl: str = "auto"
    _syncbn_normalization_batch: int | None = None
    _syncbn_fqn: str = ""
    _syncbn_activation: ActivationName | None = None
    _syncbn_negative_slope: float = 0.01
    # Packed moments in the body of accumulate_statistics(), float64 [2C + 1] or [4C + 1].
    _syncbn_pending: Tensor | None = None
    # The user's class that a layer was converted from; None for the library's classes.
    _syncbn_original: type[_BatchNorm] | None = None

    def __getattr__(self, name: str) -> Any:
        # Called only if the layer, its class and its submodules lack the attribute.
        if name in _PRIVATE and _is_setting(self, name):
            private = _PRIVATE[name]
            # A block may read getattr(layer, "activation", "relu") before and after a conversion.
            if name != "activation" or private in vars(self):
                return getattr(self, private)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PRIVATE and _is_setting(self, name):
            if name == "activation":
                check_activation(value)
            elif name == "negative_slope":
                check_activation("leaky_relu", value)
            elif name == "impl":
                if value not in IMPLS:
                    raise unknown_impl(value)
            elif name == "normalization_batch":
                check_normalization_batch(value)
            name = _PRIVATE[name]
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_syncbn_pending", None)
        if isinstance(group := self._syncbn_group, dist.ProcessGroup):
            try:
                ranks = tuple(dist.get_process_group_ranks(group))
            except KeyError:  # the group has been destroyed
                ranks = ()
            state["_syncbn_group"] = DetachedGroup(ranks)
        return state

    def __copy__(self) -> LayerState:
        # The default goes through __getstate__, which detaches a live group.
        clone = type(self).__new__(type(self))
        clone.__dict__.update(self.__dict__)
        clone.__dict__.pop("_syncbn_pending", None)
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerState:
        group = self.__dict__.get("_syncbn_group")
        memo[id(group)] = group
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        # Only the original accumulates.
        clone.__dict__.pop("_syncbn_pending", None)
        return clone


# Functions instead of methods: a converted layer may carry attributes of any name.


def layer_tensors(layer: _BatchNorm) -> tuple[Tensor | None, ...]:
    """Return weight, bias, running mean, running variance and batch counter."""
    parameters, buffers = layer._parameters, layer._buffers
    try:
        # nn.Module.__getattr__ takes a microsecond per attribute.
        running = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        return parameters["weight"], parameters["bias"], *running
    except KeyError:  # parametrized, or replaced by plain attributes
        counter = getattr(layer, "num_batches_tracked", None)
        return layer.weight, layer.bias, layer.running_mean, layer.running_var, counter


def layer_channels(layer: _BatchNorm) -> int:
    """Return the length of the layer's tensors, or ``num_features`` if it has none."""
    return first_length(layer_tensors(layer), layer.num_features)


def layer_label(layer: LayerState) -> str:
    """Return the name of a layer in error messages: name, class and channels."""
    kind = f"{type(layer).__name__}({layer.num_features})"
    return f"{layer._syncbn_fqn} {kind}" if layer._syncbn_fqn else kind


def layer_group(layer: LayerState) -> dist.ProcessGroup | None:
    """Return the group of a layer's collectives, or None for a single rank.

    Raises:
        RuntimeError: the layer was unpickled and has lost its group, or runs in ``ddp.join()``.
        ValueError: this rank is not in the group.
    """
    if isinstance(layer._syncbn_group, DetachedGroup):
        raise RuntimeError(
            f"{layer_label(layer)}: was unpickled and has lost its process group of the ranks "
            f"{list(layer._syncbn_group.ranks)}; call convert_sync_batchnorm("
            "model, process_group=...)"
        )
    group = active_group(layer._syncbn_group)
    if group is not None and not torch.compiler.is_compiling():
        _reject_join(layer)
    return group


def _reject_join(layer: LayerState) -> None:
    """Raise if a DistributedDataParallel in its ``join()`` runs the layer.

    A rank without data repeats the all-reduces of DDP only. Gloo aborts when one of them meets the
    all-reduce of a layer. Raised in the first forward, when every rank still has data.
    """
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None:
        return
    config = ddp._join_config
    # With throw_on_early_termination, all ranks stop before a layer runs.
    if config.enable and not config.throw_on_early_termination:
        raise RuntimeError(
            f"{layer_label(layer)}: got a synchronized layer in DistributedDataParallel.join(), "
            "which repeats the all-reduces of gradients only, on ranks without data; expected "
            "Join([syncbn.JoinableModel(ddp)]), or a loop over syncbn.even_batches(loader)"
        )


def normalize_input(
    layer: LayerState,
    input: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    **changes: Any,
) -> Tensor:
    """Return the output of a layer from its tensors and settings.

    Args:
        layer: synchronized layer.
        input: shape ``[N, C, *]``.
        residual: tensor added before the activation, or None.
        mask: bool mask, or None.
        changes: arguments of :func:`syncbn.ops.functional.batch_norm` in place of the layer's.
    """
    layer._check_input_dim(input)
    weight, bias, mean, var, counter = layer_tensors(layer)
    updates = layer.training and layer.track_running_stats
    arguments: dict[str, Any] = {
        "weight": weight,
        "activation": layer._syncbn_activation,
        "negative_slope": layer._syncbn_negative_slope,
    }
    return batch_norm(
        input,
        bias=bias,
        running=RunningStats(mean, var, counter, layer.momentum),
        eps=layer.eps,
        # Evaluation without running statistics uses the batch of this rank, as in torch.
        group=layer_group(layer) if layer.training else None,
        use_batch_stats=layer.training or mean is None or var is None,
        residual=residual,
        mask=mask,
        impl=layer._syncbn_impl,
        # A label would make torch.compile specialize on each of many equal layers.
        label="" if torch.compiler.is_compiling() else layer_label(layer),
        update_running=updates,
        pending=layer._syncbn_pending if updates else None,
        normalization_batch=layer._syncbn_normalization_batch if layer.training else None,
        **(arguments | changes),
    )


def first_length(tensors: tuple[Tensor | None, ...], default: int) -> int:
    """Return the length of the first tensor of :func:`layer_tensors` that has a length."""
    for tensor in tensors[:4]:
        if tensor is not None:
            return tensor.numel()
    return default


def _is_library_class(layer: LayerState) -> bool:
    """Return whether the class is the library's, not made from a user's class by conversion."""
    return type(layer)._syncbn_original is None


def _is_setting(layer: LayerState, name: str) -> bool:
    """Return whether a name of :data:`_PRIVATE` is a setting of the library in this layer."""
    if not _is_library_class(layer) or hasattr(type(layer), name):
        return False
    attributes = vars(layer)
    members = (attributes.get(kind, ()) for kind in ("_parameters", "_buffers", "_modules"))
    return name not in attributes and not any(name in member for member in members)
