"""The kernels as plain formulas: short, differentiable, traceable, on any device.

Every other kernel module has these four functions and is tested against them. Half inputs are
computed in float32, sums are combined in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.kernels.coefficients import (
    backward_coefficients,
    compute_dtype,
    normalize_coefficients,
    split_mean,
)


def moments(x: Tensor) -> Tensor:
    """Return this rank's ``[sum (C) | sum_sq (C) | count (1)]``.

    The sums are taken around the local mean and moved to the origin in float64, so that squares of
    a large mean never meet a small variance in float32.

    Args:
        x: shape ``[N, C, *]``, any floating dtype; may have no elements.

    Returns:
        float64, shape ``[2C + 1]``: the format of :meth:`syncbn.moments.Moments.unpack`.
    """
    dims = _reduced_dims(x)
    count = x.numel() // x.shape[1]
    values = x.to(compute_dtype(x.dtype))
    pivot = values.sum(dims) / max(count, 1)
    centred = values - _per_channel(pivot, x)
    pivot, rest = pivot.double(), centred.sum(dims).double()
    total = rest + count * pivot
    total_sq = centred.square().sum(dims).double() + pivot * (rest + total)
    return torch.cat([total, total_sq, total.new_full((1,), count)])


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return ``(x - mean) * invstd * weight + bias`` in x's dtype and layout.

    Args:
        x: shape ``[N, C, *]``.
        mean: float64, shape ``[C]``.
        invstd: float64, shape ``[C]``.
        weight: shape ``[C]`` or None.
        bias: shape ``[C]`` or None.
    """
    pivot, scale, shift = (
        _per_channel(v, x) for v in normalize_coefficients(mean, invstd, weight, bias, x.dtype)
    )
    return ((x - pivot) * scale + shift).to(x.dtype)


def backward_reduce(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """Return this rank's ``[sum(dy) (C) | sum(dy * xhat) (C)]``, with xhat = (x - mean) * invstd.

    Args:
        dy: gradient of the output, shape and dtype of x.
        x: shape ``[N, C, *]``.
        mean: float64, shape ``[C]``.
        invstd: float64, shape ``[C]``.

    Returns:
        float64, shape ``[2C]``.
    """
    dims = _reduced_dims(x)
    pivot, rest = split_mean(mean, x.dtype)
    gradient = dy.to(pivot.dtype)
    sum_dy = gradient.sum(dims).double()
    sum_dy_x = (gradient * (x - _per_channel(pivot, x))).sum(dims).double()
    return torch.cat([sum_dy, (sum_dy_x - rest * sum_dy) * invstd])


def backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    count: Tensor,
) -> Tensor:
    """Return dx in x's dtype and layout.

    ``dx = invstd * weight * (dy - sum(dy)/count - xhat * sum(dy * xhat)/count)``

    Args:
        dy: gradient of the output, shape and dtype of x.
        x: shape ``[N, C, *]``.
        mean: float64, shape ``[C]``.
        invstd: float64, shape ``[C]``.
        weight: shape ``[C]`` or None.
        sums: :func:`backward_reduce` summed over the group, float64, shape ``[2C]``.
        count: values per channel in the whole group, float64 scalar.
    """
    pivot, slope, offset, scale = (
        _per_channel(v, x)
        for v in backward_coefficients(mean, invstd, weight, sums, count, x.dtype)
    )
    return ((dy - offset - (x - pivot) * slope) * scale).to(x.dtype)


def _reduced_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View ``[C]`` numbers so that they broadcast against ``[N, C, *]``."""
    return v.view(-1, *(1,) * (x.ndim - 2))
