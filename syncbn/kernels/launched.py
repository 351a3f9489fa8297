"""Kernels whose launches may be made without their functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeGuard

from torch import Tensor

from syncbn.kernels import Forward, Kernel, Transform, Wanted
from syncbn.kernels.gated import Gated

if TYPE_CHECKING:
    from syncbn.kernels.triton_launch import Current, Launch


class Launched(Gated, Protocol):
    """What a kernel module may have besides.

    The launches are those of its functions for tensors that lie as those do which are given here: x
    without gaps, a residual and dy as x.
    """

    def current(self) -> Current | None:
        """Return functions that say where launches are; None if nothing is launched."""

    def forward_launches(
        self, x: Tensor, how: Forward, residual: Tensor | None, is_alone: bool
    ) -> tuple[Launch, ...]:
        """Return the launch of both steps of a group of one, or those of moments and normalize.

        Args:
            x: shape ``[N, C, *]``.
            how: the rest; averages are not cumulative.
            residual: shape and dtype of x, or None.
            is_alone: in a group of one.
        """

    def backward_launches(
        self,
        gate: Tensor | None,
        x: Tensor,
        transform: Transform,
        wanted: Wanted,
        is_alone: bool,
        is_beside: bool,
    ) -> tuple[Launch, ...]:
        """Return the launch of both steps, or theirs, and maybe that of through_gate in between.

        Args:
            gate: of the forward pass, if dy has yet to go through it.
            x: shape ``[N, C, *]``.
            transform: of the forward pass, without residual.
            wanted: weight and bias; None for each whose gradient is not.
            is_alone: in a group of one.
            is_beside: what comes through a gate is written by a launch of its own, in between.
        """


def is_launched(kernel: Kernel) -> TypeGuard[Launched]:
    """Return whether a kernel module has such launches."""
    return hasattr(kernel, "forward_launches")
