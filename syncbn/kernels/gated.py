"""Kernels that note what came through the ReLU after a residual, a bit for each value.

Others read the output for it, in a pass of its own.
"""

from __future__ import annotations

from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from syncbn.kernels import Kernel, Transform, Wanted


class Gated(Kernel, Protocol):
    """What a kernel module may have besides.

    The bits are a gate: the kernel's own business, and written by :meth:`Kernel.normalize` to where
    :attr:`Forward.gate` says. They mean something to inputs of the same
    :func:`~syncbn.kernels.layout.view_of`.
    """

    def new_gate(self, x: Tensor) -> Tensor:
        """Return an uninitialized gate for x, uint8."""

    def opened(self, gate: Tensor, x: Tensor) -> Tensor:
        """Return where the output was positive or NaN: bool, shape of x."""

    def through_gate(self, dy: Tensor, gate: Tensor, x: Tensor) -> Tensor:
        """Return what comes through the ReLU: dy where the gate is open, and zero elsewhere.

        Args:
            dy: gradient of the output, shape and dtype of x.
            gate: of the forward pass.
            x: shape ``[N, C, *]``.
        """

    def backward_reduce_gated(
        self,
        dy: Tensor,
        gate: Tensor,
        x: Tensor,
        transform: Transform,
        wanted: Wanted = (None, None),
        may_overwrite: bool = False,
        write: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return what comes through the ReLU, and :meth:`Kernel.backward_reduce` of it.

        Args:
            dy: gradient of the output, shape and dtype of x.
            gate: of the forward pass.
            x: shape ``[N, C, *]``.
            transform: of the forward pass, without residual and ReLU.
            wanted: weight and bias; None for each whose gradient is not.
            may_overwrite: nobody needs dy any more; the result may be written there.
            write: whether what comes through is written, in the same pass; else dy stands for it,
                or a copy that lies as x does.
        """

    def backward_alone_gated(
        self,
        dy: Tensor,
        gate: Tensor,
        x: Tensor,
        transform: Transform,
        wanted: Wanted,
        may_overwrite: bool = False,
        keep_gated: bool = False,
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """Return what comes through the ReLU, dx of that, dweight and dbias, in a group of one.

        Args:
            dy: as for :meth:`backward_reduce_gated`, and so are those that follow.
            gate: of the forward pass.
            x: shape ``[N, C, *]``.
            transform: of the forward pass, without residual and ReLU.
            wanted: weight and bias; None for each whose gradient is not.
            may_overwrite: nobody needs dy any more.
            keep_gated: whether what comes through is wanted; else it is None.
        """


def is_gated(kernel: Kernel) -> TypeGuard[Gated]:
    """Return whether a kernel module can."""
    return hasattr(kernel, "backward_reduce_gated")


def through_relu(dy: Tensor, y: Tensor, may_overwrite: bool) -> Tensor:
    """Return dy where y is positive or NaN, else zero; in dy's memory, if it may be overwritten."""
    threshold = torch.ops.aten.threshold_backward
    if may_overwrite and dy.stride() == y.stride():
        found: Tensor = threshold.grad_input(dy, y, 0, grad_input=dy)
    else:
        found = threshold(dy, y, 0)
    return found
