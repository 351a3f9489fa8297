"""The gradients of the input gradient, as plain formulas for every device.

With the names of :class:`syncbn.ops.batch_norm.SyncBatchNormBackward`: h the gradient that arrives at dx,
u and v those at dweight and dbias, g the gradient of the output after the ReLU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.kernels.coefficients import Transform, compute_dtype, split_mean
from syncbn.kernels.reference import per_channel, reduced_dims


class Second(NamedTuple):
    """What the second-order pass returns.

    Attributes:
        dy: gradient of g, before the mask of the ReLU; dtype and shape of x.
        x: gradient of x.
        weight: gradient of the weight, this rank's; float64, shape ``[C]``.
    """

    dy: Tensor
    x: Tensor
    weight: Tensor


def second_reduce(h: Tensor, g: Tensor, x: Tensor, transform: Transform) -> Tensor:
    """Return this rank's ``[sum(h) (C) | sum(h * xhat) (C) | sum(h * g) (C)]``.

    Args:
        h: gradient of dx, shape and dtype of x.
        g: gradient of the output after the ReLU, shape and dtype of x.
        x: shape ``[N, C, *]``.
        transform: of the forward pass.

    Returns:
        float64, shape ``[3C]``.
    """
    dims = reduced_dims(x)
    wide = compute_dtype(x.dtype)
    h, g, xhat = h.to(wide), g.to(wide), _xhat(x, transform)
    return torch.cat([values.sum(dims).double() for values in (h, h * xhat, h * g)])


def second_elemt(
    h: Tensor,
    g: Tensor,
    x: Tensor,
    transform: Transform,
    first: Tensor,
    mine: Tensor,
    message: Tensor,
    u: Tensor,
    v: Tensor,
) -> Second:
    """Return the gradients.

    Args:
        h: gradient of dx, shape and dtype of x.
        g: gradient of the output after the ReLU, shape and dtype of x.
        x: shape ``[N, C, *]``.
        transform: of the forward pass.
        first: ``[sum(g) | sum(g * xhat)]`` over the group, float64, shape ``[2C]``.
        mine: :func:`second_reduce`.
        message: the same, then ``[sum_r u_r sum(g) | sum_r u_r sum(g * xhat)]``, over the group;
            float64, shape ``[5C]``.
        u: gradient of this rank's dweight, float64, shape ``[C]``.
        v: gradient of this rank's dbias, float64, shape ``[C]``.
    """
    n, a = transform.values, transform.invstd
    scale = a if transform.weight is None else a * transform.weight
    mean_g, mean_gx = (first / n).view(2, -1)
    mean_h, mean_hx, mean_hg, mean_ug, mean_ugx = (message / n).view(5, -1)
    sum_h, sum_hx, sum_hg = mine.view(3, -1)
    k = mean_hg - mean_g * mean_h - mean_gx * mean_hx
    mean_q = mean_ug - scale * (mean_g * mean_hx + mean_h * mean_gx)
    mean_qx = mean_ugx - 2 * scale * mean_gx * mean_hx

    xhat = _xhat(x, transform)
    h, g = h.to(xhat.dtype), g.to(xhat.dtype)

    def wide(number: Tensor) -> Tensor:
        return per_channel(number.to(xhat.dtype), x)

    of_dy = wide(scale) * h + wide(u - scale * mean_hx) * xhat + wide(v - scale * mean_h)
    of_x = wide(u - scale * mean_hx) * g - wide(scale * mean_gx) * h
    of_x = wide(a) * (of_x - wide(mean_q) - wide(mean_qx + scale * k) * xhat)
    of_weight = a * (sum_hg - mean_g * sum_h - mean_gx * sum_hx)
    return Second(of_dy.to(x.dtype), of_x.to(x.dtype), of_weight)


def _xhat(x: Tensor, transform: Transform) -> Tensor:
    pivot, rest = split_mean(transform.mean, x.dtype)
    invstd = transform.invstd
    scale, shift = (per_channel(v.to(pivot.dtype), x) for v in (invstd, -rest * invstd))
    return (x - per_channel(pivot, x)) * scale + shift
