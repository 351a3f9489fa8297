"""Layer calls in ``torch.fx`` graphs."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy, Tracer


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward or backward hooks."""
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def record_call(layer: nn.Module, input: Proxy, residual: Any, mask: Any) -> Any:
    """Record a layer call as one node of a ``torch.fx`` graph, like the layers of ``torch.nn``.

    ``Tracer.is_leaf_module`` accepts only modules whose class is defined in ``torch.nn``.

    Args:
        layer: the called layer.
        input: symbolic input.
        residual: symbolic residual, or None.
        mask: symbolic mask, or None.

    Returns:
        The symbolic output.

    Raises:
        RuntimeError: the layer is the root of the trace, or has hooks: hooks run around this call
            and again in the traced module.
    """
    tracer, name = input.tracer, type(layer).__name__
    path = tracer.path_of_module(layer) if isinstance(tracer, Tracer) else ""
    if not path:
        raise RuntimeError(
            f"{name}: got a torch.fx trace with this layer as root; expected a model that contains "
            "the layer"
        )
    if has_hooks(layer):
        raise RuntimeError(
            f"{path} {name}: got a torch.fx trace of a layer with hooks; remove the hooks before "
            "tracing, or pass a Tracer with is_leaf_module() true for this layer"
        )
    kwargs = {k: v for k, v in {"residual": residual, "mask": mask}.items() if v is not None}
    return tracer.create_proxy("call_module", path, (input,), kwargs)
