"""Forward passes that stop at every batch-norm layer, side by side in one thread.

Each runs in a coroutine (greenlet), which can stop in the middle of anything a model's forward
calls. Threads could, too, and were measured at 1.5 to 3 times a plain pass for small batches.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import NamedTuple

import greenlet
import torch
from torch import Tensor

from syncbn.calibration.layers import Layer

# The kinds of scaled_dot_product_attention, which torch.nn.attention.sdpa_kernel chooses from.
_ATTENTION = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


class Stop(NamedTuple):
    """Where a forward pass has stopped.

    Attributes:
        layer: before whose forward.
        input: of the layer, ``[N, C, *]``.
    """

    layer: Layer
    input: Tensor


class Suspended:
    """A forward pass that runs from one batch-norm layer to the next.

    Args:
        run: the whole pass; it calls :func:`stop` where it may be stopped.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._coroutine = greenlet.greenlet(run)
        self._coroutine.gr_context = contextvars.copy_context()
        self._ours = self._settings = _Settings.now()
        self._inference = torch.is_inference_mode_enabled()

    def resume(self) -> Stop | None:
        """Run to the next layer and return where; None at the end of the pass.

        Raises:
            BaseException: what the pass raised.
        """
        # The coroutine may be within torch.autocast, say, and must not leave others there.
        if self._settings != self._ours:
            self._settings.apply()
        try:
            stop = self._coroutine.switch()
        finally:
            self._settings = _Settings.now()
            if self._settings != self._ours:
                self._ours.apply()
        if self._coroutine.dead:
            return None
        if torch.is_inference_mode_enabled() != self._inference:
            raise ValueError(
                f"{stop.layer.name}: called within torch.inference_mode(), which cannot be "
                "suspended; use torch.no_grad() in the forward, or method='sequential'"
            )
        return stop  # type: ignore[no-any-return]  # what greenlets give each other

    @property
    def is_suspended(self) -> bool:
        """True between the first layer and the end of the pass."""
        return bool(self._coroutine)

    def close(self) -> None:
        """End the pass where it is; its ``finally`` blocks run."""
        if self.is_suspended:
            self._coroutine.throw()


def stop(layer: Layer, x: Tensor) -> None:
    """Stop the pass that comes to a layer with an input; returns when the pass is resumed.

    Raises:
        RuntimeError: the caller is not in a :class:`Suspended` pass.
    """
    parent = greenlet.getcurrent().parent
    if parent is None:
        raise RuntimeError(
            f"{layer.name}: called in a thread of the model's own; expected a forward that calls "
            "its layers in the thread that it was called in"
        )
    parent.switch(Stop(layer, x))


class _Settings(NamedTuple):
    """What a pass may have set for its thread, and others must not see."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    device: int
    attention: tuple[bool, ...]

    @staticmethod
    def now() -> _Settings:
        cuda = torch.cuda.is_initialized()
        kinds = ("cpu", "cuda") if cuda else ("cpu",)
        return _Settings(
            torch.is_grad_enabled(),
            tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in kinds
            ),
            torch.cuda.current_device() if cuda else 0,
            tuple(enabled() for enabled, _ in _ATTENTION),
        )

    def apply(self) -> None:
        torch.set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        if torch.cuda.is_initialized():
            torch.cuda.set_device(self.device)
        for (_, enable), enabled in zip(_ATTENTION, self.attention, strict=True):
            enable(enabled)
