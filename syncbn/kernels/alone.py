"""Forward and backward of a group of one, which waits for nobody in between."""

from __future__ import annotations

from typing import Protocol, TypeGuard

from torch import Tensor

from syncbn.kernels import Forward, Kernel, Transform, Wanted


class Together(Protocol):
    """What a kernel module may have besides: both steps of a pass in one."""

    def forward_alone(
        self, x: Tensor, how: Forward, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :func:`forward`."""

    def backward_alone(
        self,
        dy: Tensor,
        x: Tensor,
        transform: Transform,
        wanted: Wanted,
        may_overwrite: bool = False,
        keep_sums: bool = False,
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """See :func:`backward`."""


def _is_together(kernel: object) -> TypeGuard[Together]:
    return hasattr(kernel, "forward_alone")


def forward(
    kernel: Kernel, x: Tensor, how: Forward, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what :meth:`Kernel.normalize` returns, by :meth:`Kernel.moments` of x.

    Args:
        kernel: whose functions these are, one after the other; or in one, if it can.
        x: shape ``[N, C, *]``.
        how: the rest.
        residual: shape and dtype of x, or None.
    """
    if _is_together(kernel):
        return kernel.forward_alone(x, how, residual)
    return kernel.normalize(x, kernel.moments(x), how, residual)


def backward(
    kernel: Kernel,
    dy: Tensor,
    x: Tensor,
    transform: Transform,
    wanted: Wanted,
    may_overwrite: bool = False,
    keep_sums: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Return the sums of :meth:`Kernel.backward_reduce`, dx, dweight and dbias.

    Args:
        kernel: whose functions these are, one after the other; or in one, if it can.
        dy: gradient of the output, shape and dtype of x.
        x: shape ``[N, C, *]``.
        transform: of the forward pass, without residual.
        wanted: weight and bias; None for each whose gradient is not needed.
        may_overwrite: nobody needs dy any more; a kernel may write dx there.
        keep_sums: whether the sums are wanted, float64 ``[2C]``; else there may be none.
    """
    if _is_together(kernel):
        return kernel.backward_alone(dy, x, transform, wanted, may_overwrite, keep_sums)
    sums, dweight, dbias = kernel.backward_reduce(dy, x, transform, wanted)
    return sums, kernel.backward_elemt(dy, x, transform, sums, may_overwrite), dweight, dbias
