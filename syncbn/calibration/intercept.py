"""A look at the inputs of layers just before they are normalized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from syncbn.calibration.layers import Layer


@contextmanager
def intercepted(layers: Sequence[Layer], look: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Call a function before each forward of the layers in the body.

    Args:
        layers: whose forwards.
        look: gets the layer and its input, ``[N, C, *]``; the layer then uses the statistics that
            are in its buffers when this returns.
    """
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.module.register_forward_pre_hook(_hook(layer, look), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hook(layer: Layer, look: Callable[[Layer, Tensor], None]) -> Callable[..., None]:
    def hook(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        look(layer, x.detach())

    return hook
