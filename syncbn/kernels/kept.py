"""Kernels whose launches are kept, for another language to repeat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeGuard

from torch import Tensor

from syncbn.kernels import Forward, Kernel, Transform, Wanted
from syncbn.kernels.gated import Gated

if TYPE_CHECKING:
    from syncbn.kernels.triton_driver import Calls
    from syncbn.kernels.triton_launch import Current


class Kept(Gated, Protocol):
    """What a kernel module may have besides.

    Launches are for tensors that lie as those do which are given: x without gaps, a residual and dy
    as x, all at multiples of 16 bytes. They are None until there has been such a pass of a group of
    one on the current stream.
    """

    def current(self) -> Current | None:
        """Return functions that say where launches are; None if none are kept."""

    def kept_forward(self, x: Tensor, how: Forward, residual: Tensor | None) -> Calls | None:
        """Return the launches of :func:`syncbn.kernels.alone.forward`.

        Args:
            x: shape ``[N, C, *]``.
            how: the rest; averages are not cumulative.
            residual: shape and dtype of x, or None.
        """

    def kept_backward(
        self, gate: Tensor | None, x: Tensor, transform: Transform, wanted: Wanted
    ) -> Calls | None:
        """Return the launches of :func:`syncbn.kernels.alone.backward`.

        Or of :meth:`~syncbn.kernels.gated.Gated.backward_alone_gated`.

        Args:
            gate: of the forward pass, if dy has yet to go through it.
            x: shape ``[N, C, *]``.
            transform: of the forward pass, without residual.
            wanted: weight and bias; None for each whose gradient is not.
        """


def is_kept(kernel: Kernel) -> TypeGuard[Kept]:
    """Return whether a kernel module has such launches."""
    return hasattr(kernel, "kept_forward")
