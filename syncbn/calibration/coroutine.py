"""Forward passes suspended at batch-norm layers, side by side in one thread.

Each pass runs in a coroutine (greenlet), which can be suspended anywhere below the model's forward.
Threads can be, too, but took 1.5 to 3 times a plain pass for small batches.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import NamedTuple

import greenlet
import torch
from torch import Tensor

from syncbn.nn.bn_layers import BNLayer

# Backends of scaled_dot_product_attention, selected by torch.nn.attention.sdpa_kernel.
_SDPA_BACKENDS = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


class Suspension(NamedTuple):
    """Point at which a forward pass is suspended.

    Attributes:
        layer: layer whose forward comes next.
        input: input of the layer, shape ``[N, C, *]``.
    """

    layer: BNLayer
    input: Tensor


class ForwardCoroutine:
    """Forward pass that runs from one batch-norm layer to the next.

    Args:
        run: whole pass; it calls :func:`suspend` at the layers.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._greenlet = greenlet.greenlet(run)
        self._greenlet.gr_context = contextvars.copy_context()
        self._caller_state = self._state = _ThreadLocalState.get()
        self._inference = torch.is_inference_mode_enabled()

    def resume(self) -> Suspension | None:
        """Run to the next layer; return None at the end of the pass.

        Raises:
            BaseException: the pass raised.
        """
        # The pass may be within torch.autocast, which must not affect other passes.
        if self._state != self._caller_state:
            self._state.set()
        try:
            suspension = self._greenlet.switch()
        finally:
            self._state = _ThreadLocalState.get()
            if self._state != self._caller_state:
                self._caller_state.set()
        if self._greenlet.dead:
            return None
        if torch.is_inference_mode_enabled() != self._inference:
            raise ValueError(
                f"{suspension.layer.name}: called within torch.inference_mode(), which cannot be "
                "suspended; use torch.no_grad() in the forward, or method='sequential'"
            )
        return suspension  # type: ignore[no-any-return]  # greenlet is untyped

    @property
    def is_suspended(self) -> bool:
        """True between the first layer and the end of the pass."""
        return bool(self._greenlet)

    def close(self) -> None:
        """End the pass early; its ``finally`` blocks run."""
        if self.is_suspended:
            self._greenlet.throw()


def suspend(layer: BNLayer, x: Tensor) -> None:
    """Suspend the current pass at a layer with an input; return when the pass is resumed.

    Raises:
        RuntimeError: the caller does not run in a :class:`ForwardCoroutine`.
    """
    parent = greenlet.getcurrent().parent
    if parent is None:
        raise RuntimeError(
            f"{layer.name}: called in another thread than the forward; expected a forward that "
            "calls its layers in the thread of its caller"
        )
    parent.switch(Suspension(layer, x))


class _ThreadLocalState(NamedTuple):
    """Thread-local settings of torch, separate for each pass."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    device: int
    sdpa: tuple[bool, ...]

    @staticmethod
    def get() -> _ThreadLocalState:
        cuda = torch.cuda.is_initialized()
        kinds = ("cpu", "cuda") if cuda else ("cpu",)
        return _ThreadLocalState(
            torch.is_grad_enabled(),
            tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in kinds
            ),
            torch.cuda.current_device() if cuda else 0,
            tuple(is_enabled() for is_enabled, _ in _SDPA_BACKENDS),
        )

    def set(self) -> None:
        torch.set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        if torch.cuda.is_initialized():
            torch.cuda.set_device(self.device)
        for (_, enable), enabled in zip(_SDPA_BACKENDS, self.sdpa, strict=True):
            enable(enabled)
