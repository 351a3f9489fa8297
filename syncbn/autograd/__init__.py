"""Batch norm over the values of every rank of a group, for autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn import modes
from syncbn.autograd import any_order, masking
from syncbn.autograd.call import Call as Call
from syncbn.autograd.function import SyncBatchNormFunction


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
        residual: added before the ReLU; shape and dtype of x, or None.
        mask: bool, true where x counts; broadcasts against x and has one channel. None for
            everywhere. Elsewhere the output is zero.
        call: the rest.
    """
    if mask is not None:
        x, absent = masking.fill(x, mask)
        call = call._replace(absent=absent)
    if modes.is_transformed() or modes.is_forward_differentiated():
        y = any_order.forward(x, weight, bias, residual, call)
    else:
        if residual is x:  # torch.compile refuses a tensor that is given twice
            residual = x.view_as(x)
        y = SyncBatchNormFunction.apply(x, weight, bias, residual, call)
    return y if mask is None else torch.where(mask, y, 0)
