"""A look at the inputs of layers just before they are normalized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from syncbn.calibration.layers import Layer
from syncbn.nn.module import SyncBatchNorm

# Arguments of our layers. Another layer may give the later ones another meaning.
_ARGUMENTS = ("input", "residual", "mask")


@contextmanager
def intercepted(layers: Sequence[Layer], look: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Call a function before each forward of the layers in the body.

    Args:
        layers: whose forwards.
        look: gets the layer and its input, ``[N, C, *]``; the layer then uses the statistics that
            are in its buffers when this returns.

    Raises:
        ValueError: in the forward of a layer that is called with a mask.
    """
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.module.register_forward_pre_hook(_hook(layer, look), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hook(layer: Layer, look: Callable[[Layer, Tensor], None]) -> Callable[..., None]:
    def hook(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        if isinstance(module, SyncBatchNorm) and named.get("mask") is not None:
            raise ValueError(
                f"{layer.name}: called with a mask; calibration takes inputs that count everywhere"
            )
        # Layers of torch may call it as they like.
        x: Tensor = named["input"] if "input" in named else next(iter(named.values()))
        look(layer, x.detach())

    return hook
