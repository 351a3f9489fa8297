"""Batch-norm layers of other libraries with fused or additional operations.

An adapter is the forward of such a layer, with a function in place of its batch norm::

    def adapter(layer, normalize, x):
        return layer.act(layer.drop(normalize(x)))

``normalize(x, residual=None, mask=None)`` is :meth:`syncbn.SyncBatchNorm.forward` with the tensors
of the layer. Options by name replace its settings: ``weight``, ``activation``, ``negative_slope``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from syncbn.nn.activation_modules import find_activation
from syncbn.nn.fx_call import record_call
from syncbn.nn.layer_state import LayerState, normalize_input

Adapter: TypeAlias = Callable[..., Tensor]
Adapters: TypeAlias = Mapping[type[nn.Module], Adapter]

_NEEDED = ("num_features", "eps", "momentum", "weight", "bias", "running_mean", "running_var")


def adapt_plain(layer: nn.Module, normalize: Adapter, x: Tensor) -> Tensor:
    """Forward of a layer that is only a batch norm."""
    return normalize(x)


def adapt_apex(layer: Any, normalize: Adapter, x: Tensor, z: Tensor | None = None) -> Tensor:
    """Forward of apex's ``SyncBatchNorm``: an addition and a ReLU, both optional."""
    activation = "relu" if layer.fuse_relu else None
    if not layer.channel_last or x.ndim <= 2:
        return normalize(x, residual=z, activation=activation)
    z = None if z is None else z.movedim(-1, 1)
    return normalize(x.movedim(-1, 1), residual=z, activation=activation).movedim(1, -1)


def adapt_timm(layer: Any, normalize: Adapter, x: Tensor) -> Tensor:
    """Forward of timm's ``BatchNormAct2d``: dropout, then an activation."""
    activation = find_activation(layer.act)
    if activation is not None and type(layer.drop) is nn.Identity:
        name, slope = activation
        return normalize(x, activation=name, negative_slope=slope)
    y: Tensor = layer.act(layer.drop(normalize(x)))
    return y


def adapt_inplace_abn(layer: Any, normalize: Adapter, x: Tensor) -> Tensor:
    """Forward of ``InPlaceABN``, out of place."""
    return _normalize_abn(layer, normalize, x, layer.activation, layer.activation_param)


def adapt_timm_abn(layer: Any, normalize: Adapter, x: Tensor) -> Tensor:
    """Forward of timm's ``InplaceAbn``, out of place."""
    return _normalize_abn(layer, normalize, x, layer.act_name, layer.act_param)


def _normalize_abn(
    layer: Any, normalize: Adapter, x: Tensor, name: str, parameter: float
) -> Tensor:
    """Return batch norm with the scale ``|weight| + eps``, and an activation.

    The scale is positive because the layer inverts its activation in the backward pass (Rota Bulo,
    Porzi and Kontschieder, In-Place Activated BatchNorm, 2018, section 3).
    """
    weight = None if layer.weight is None else layer.weight.abs() + layer.eps
    match name:
        case "leaky_relu":
            return normalize(x, weight=weight, activation=name, negative_slope=parameter)
        case "elu":
            return F.elu(normalize(x, weight=weight), parameter)
        case "identity":
            return normalize(x, weight=weight)
    raise ValueError(f"got activation {name!r}; expected 'leaky_relu', 'elu' or 'identity'")


#: Adapters by the qualified name of a class: the libraries are not imported.
KNOWN: dict[str, Adapter] = {
    "timm.layers.norm_act.BatchNormAct2d": adapt_timm,
    "timm.layers.norm_act.SyncBatchNormAct": adapt_timm,
    "timm.layers.inplace_abn.InplaceAbn": adapt_timm_abn,
    "inplace_abn.abn.InPlaceABN": adapt_inplace_abn,
    "inplace_abn.abn.InPlaceABNSync": adapt_inplace_abn,
    "apex.parallel.optimized_sync_batchnorm.SyncBatchNorm": adapt_apex,
    "apex.parallel.sync_batchnorm.SyncBatchNorm": adapt_plain,
    "detectron2.layers.batch_norm.NaiveSyncBatchNorm": adapt_plain,
    "fairscale.experimental.nn.sync_batchnorm.SyncBatchNorm": adapt_plain,
    "horovod.torch.sync_batch_norm.SyncBatchNorm": adapt_plain,
    "mmcv.ops.sync_bn.SyncBatchNorm": adapt_plain,
}


def make_forward(adapter: Adapter) -> Callable[..., Tensor]:
    """Return the forward of layers with an adapter."""

    def forward(self: LayerState, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(input, Proxy):
            return record_call(self, input, None, None)
        y = adapter(self, partial(normalize_input, self), input, *args, **kwargs)
        return _check_output(self, y, input)

    return forward


def find_adapter(layer: nn.Module, adapters: Adapters) -> Adapter | None:
    """Return the adapter for a layer's class; None without one.

    Raises:
        ValueError: the layer lacks an attribute of a batch norm.
    """
    kind = type(layer)
    adapter = adapters.get(kind) or KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
    missing = [name for name in _NEEDED if not hasattr(layer, name)]
    if adapter is not None and missing:
        raise ValueError(
            f"adapters: got a {kind.__qualname__} without {', '.join(missing)}; expected the "
            "attributes of an nn.BatchNorm2d"
        )
    return adapter


def check_adapters(adapters: Any) -> None:
    """Check the argument of ``convert_sync_batchnorm``.

    Raises:
        ValueError: no mapping of module classes to functions.
    """
    items = adapters.items() if isinstance(adapters, Mapping) else [(adapters, None)]
    for kind, adapter in items:
        is_module_class = isinstance(kind, type) and issubclass(kind, nn.Module)
        if not is_module_class or kind.__module__.startswith("torch.nn.") or not callable(adapter):
            raise ValueError(
                f"adapters: got {kind!r}: {adapter!r}; expected classes of modules, other than "
                "torch's, and functions adapter(layer, normalize, x)"
            )


def _check_output(layer: nn.Module, y: Any, x: Tensor) -> Tensor:
    """Return the output of an adapter.

    Raises:
        ValueError: no tensor of the input's shape.
    """
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"{type(layer).__name__}: got {got} from the adapter for an input of shape "
            f"{tuple(x.shape)}; expected a tensor of that shape"
        )
    return y
