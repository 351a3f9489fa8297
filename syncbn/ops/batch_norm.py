"""Batch norm over the values of every rank of a group, for autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn import modes
from syncbn.ops import composite as any_order
from syncbn.ops import masking
from syncbn.ops.function import SyncBatchNormFunction
from syncbn.ops.params import Call as Call


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    call: Call,
) -> Tensor:
    """Return what batch norm makes of x; move the running averages.

    Args:
        x: shape ``[N, C, *]``.
        weight: shape ``[C]``, or None for ones.
        bias: shape ``[C]``, or None for zeros.
        residual: added before the ReLU, or None.
        mask: bool, true where x counts; broadcasts against x and has one channel. None for
            everywhere. Elsewhere the output is zero.
        call: the rest.
    """
    if residual is not None and not _is_alike(x, residual):
        y = normalize(x, weight, bias, None, mask, call._replace(relu=False))
        return finish(y, residual, call.relu, mask)
    if mask is not None:
        x, filling = masking.fill(x, mask)
        call = call._replace(filling=filling)
    if modes.in_functorch_transform() or modes.in_forward_ad():
        y = any_order.forward(x, weight, bias, residual, call)
    else:
        # torch.compile refuses one tensor as two arguments.
        residual = x.view_as(x) if residual is x else residual
        y = SyncBatchNormFunction.apply(x, weight, bias, residual, call)
    return y if mask is None else torch.where(mask, y, 0)


def finish(y: Tensor, residual: Tensor | None, relu: bool, mask: Tensor | None) -> Tensor:
    """Return what comes after the normalization, in passes of its own.

    Args:
        y: what has been normalized; may be overwritten.
        residual: added to it, or None.
        relu: whether a ReLU comes then.
        mask: true where values count; broadcasts against y. None for everywhere.
    """
    y = y if residual is None else y + residual
    y = y.relu_() if relu else y
    return y if mask is None else torch.where(mask, y, 0)


def _is_alike(x: Tensor, residual: object) -> bool:
    """Return whether the kernels take a residual."""
    if not isinstance(residual, Tensor):
        return False
    return (x.shape, x.dtype, x.device) == (residual.shape, residual.dtype, residual.device)
