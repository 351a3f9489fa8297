"""The kernels as plain formulas: short, differentiable, traceable, on any device.

Every other kernel module has these functions and is tested against them. Half inputs are computed
in float32, sums are combined in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.kernels.coefficients import (
    Forward,
    Running,
    Transform,
    Wanted,
    backward_coefficients,
    compute_dtype,
    normalize_coefficients,
    split_mean,
)
from syncbn.moments import Moments, has_two_parts


def moments(x: Tensor) -> Tensor:
    """Return this rank's ``[sum (C) | sum_sq (C) | count (1)]``; two-part sums of float64 inputs.

    The sums are taken around the local mean and moved to the origin in float64, so that squares of
    a large mean never meet a small variance in float32. Squares are of the compute dtype: in
    float32 the variance of values that are 1e19 away from their mean is infinite, in every kernel.

    Args:
        x: shape ``[N, C, *]``, any floating dtype; may have no elements.

    Returns:
        float64, shape ``[2C + 1]``, or ``[4C + 1]`` for float64 inputs: the format of
        :meth:`syncbn.moments.Moments.pack`.
    """
    dims = reduced_dims(x)
    count = x.numel() // x.shape[1]
    values = x.to(compute_dtype(x.dtype))
    pivot = values.sum(dims) / max(count, 1)
    centred = values - per_channel(pivot, x)
    pivot, first = pivot.double(), centred.sum(dims).double()
    second = centred.square().sum(dims).double()
    two_parts = has_two_parts(x.dtype)
    return Moments.from_pivot(pivot.new_full((), count), pivot, first, second, two_parts).pack()


def statistics(group: Moments, eps: float) -> Tensor:
    """Return ``[mean (C) | invstd (C) | count (1)]``, float64: :class:`Transform`'s statistics.

    Args:
        group: :func:`moments` summed over the group.
        eps: added to the variance.
    """
    mean, squares = group.mean_and_m2()
    invstd = (squares / group.count.clamp(min=1) + eps).rsqrt()
    return torch.cat([mean, invstd, group.count.reshape(1)])


def move_running(group: Moments, running: Running) -> None:
    """Count a batch, and move running averages towards it, in place, without a host sync.

    ``running <- (1 - momentum) running + momentum batch``, with the unbiased variance, as torch.
    Fewer than two values a channel have no variance. Such a batch is not recorded: when every rank
    is empty, averages and counter stay as they are, and no NaN reaches them.

    Args:
        group: :func:`moments` summed over the group.
        running: the averages.
    """
    mean, var, tracked, momentum = running
    counts = group.count > 1
    weight: float | Tensor = 0.0 if momentum is None else momentum
    with torch.no_grad():
        if tracked is not None:
            tracked.add_(counts)
            if momentum is None:
                # A tensor, not .item(): reading the counter would stall a GPU.
                weight = tracked.clamp(min=1).double().reciprocal()
        for average, batch in ((mean, group.mean()), (var, group.variance(unbiased=True))):
            if average is not None:
                # In float64, so that a half buffer rounds once.
                average.copy_(average + torch.where(counts, batch - average, 0.0) * weight)


def normalize(
    x: Tensor, message: Tensor, how: Forward, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return y in x's dtype and layout, and :func:`statistics`; and :func:`move_running`.

    ``y = (x - mean) * invstd * weight + bias``, plus the residual, through the ReLU.

    Args:
        x: shape ``[N, C, *]``.
        message: :func:`moments` summed over the group.
        how: the rest.
        residual: shape and dtype of x, or None.
    """
    group = Moments.unpack(message, x.shape[1])
    if how.running is not None:
        move_running(group, how.running)
    found = statistics(group, how.eps)
    y = affine(x, Transform(found, how.weight, how.bias))
    if residual is not None:
        y = y + residual
    return (y.relu() if how.relu else y).to(x.dtype), found


def backward_reduce(
    dy: Tensor, x: Tensor, transform: Transform, wanted: Wanted = (None, None)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return this rank's ``[sum(dy) (C) | sum(dy * xhat) (C)]``, dweight and dbias.

    With ``xhat = (x - mean) * invstd``. The gradients of the parameters are these sums, rounded.

    Args:
        dy: gradient of the output, shape and dtype of x; what comes through the ReLU counts.
        x: shape ``[N, C, *]``.
        transform: of the forward pass, without residual.
        wanted: weight and bias; None for each whose gradient is not.

    Returns:
        The sums, float64, shape ``[2C]``; the gradients, shape ``[C]``, the dtype of the parameter
        and memory of their own, or None where they are not wanted.
    """
    dims = reduced_dims(x)
    pivot, rest = split_mean(transform.mean, x.dtype)
    gradient = _through_relu(dy, x, transform).to(pivot.dtype)
    sum_dy = gradient.sum(dims).double()
    sum_dy_x = (gradient * (x - per_channel(pivot, x))).sum(dims).double()
    sums = torch.cat([sum_dy, (sum_dy_x - rest * sum_dy) * transform.invstd])
    return sums, *parameter_gradients(sums, *wanted)


def backward_elemt(
    dy: Tensor, x: Tensor, transform: Transform, sums: Tensor, may_overwrite: bool = False
) -> Tensor:
    """Return dx in x's dtype and layout.

    ``dx = invstd * weight * (dy - sum(dy)/count - xhat * sum(dy * xhat)/count)``

    Args:
        dy: gradient of the output, shape and dtype of x; what comes through the ReLU counts.
        x: shape ``[N, C, *]``.
        transform: of the forward pass, without residual.
        sums: :func:`backward_reduce` summed over the group, float64, shape ``[2C]``.
        may_overwrite: nobody needs dy any more; a kernel may write dx there.
    """
    dy = _through_relu(dy, x, transform)
    pivot, slope, offset, scale = (
        per_channel(v, x) for v in backward_coefficients(transform, sums, x.dtype)
    )
    return ((dy - offset - (x - pivot) * slope) * scale).to(x.dtype)


def parameter_gradients(
    sums: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return dweight and dbias; see :func:`backward_reduce`."""
    sum_dy, sum_dy_xhat = sums.split(sums.numel() // 2)
    dweight = None if weight is None else sum_dy_xhat.to(weight.dtype, copy=True)
    return dweight, None if bias is None else sum_dy.to(bias.dtype, copy=True)


def affine(x: Tensor, t: Transform) -> Tensor:
    """Return ``(x - mean) * invstd * weight + bias`` in the compute dtype."""
    coefficients = normalize_coefficients(t.mean, t.invstd, t.weight, t.bias, x.dtype)
    pivot, scale, shift = (per_channel(v, x) for v in coefficients)
    return (x - pivot) * scale + shift


def _through_relu(dy: Tensor, x: Tensor, transform: Transform) -> Tensor:
    # Where torch's ReLU lets a gradient pass: not at zero, but at NaN.
    return dy.masked_fill(affine(x, transform) <= 0, 0) if transform.relu else dy


def reduced_dims(x: Tensor) -> list[int]:
    """Return the dimensions of ``[N, C, *]`` that a channel's values are along."""
    return [0, *range(2, x.ndim)]


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View ``[C]`` numbers so that they broadcast against ``[N, C, *]``."""
    return v.view(-1, *(1,) * (x.ndim - 2))
