"""The kernels on CUDA without Triton: ATen's own batch-norm kernels, which exist there alone.

ATen computes with a float32 mean. Passing it the pivot of :mod:`syncbn.kernels.coefficients` as
"mean" and correcting the C numbers around it keeps the precision of the split mean. The
functions are those of :mod:`syncbn.kernels.reference`; none synchronizes with the host, and all
accept tensors without elements. ATen has no fused ReLU and residual: they are calls of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.kernels.coefficients import (
    Forward,
    Transform,
    Wanted,
    compute_dtype,
    normalize_coefficients,
    split_mean,
)
from syncbn.kernels.reference import move_running, parameter_gradients, statistics
from syncbn.moments import Moments, get_packed_size, has_two_parts


def moments(x: Tensor) -> Tensor:
    """See :func:`syncbn.kernels.reference.moments`."""
    channels = x.shape[1]
    count = x.numel() // channels
    if count == 0:
        size = get_packed_size(channels, x.dtype)
        return torch.zeros(size, dtype=torch.float64, device=x.device)
    if x.dtype in (torch.float16, torch.bfloat16):
        # A half type cannot hold a variation its mean dwarfs, so there is nothing to shift away.
        values, pivot = x, torch.zeros(channels, dtype=torch.float64, device=x.device)
    else:
        # The mean of one sample, and not one value, which may be padding and far from the rest.
        first = x[0].reshape(channels, -1).mean(1)
        values = x - first.view(-1, *(1,) * (x.ndim - 2))
        pivot = first.double()
    # eps = 0 so that the variance comes back whole; ATen returns invstd = 0 for a constant channel,
    # and of course for one whose variance is infinite.
    mean, invstd = torch.batch_norm_stats(values, 0.0)
    rest = mean.double()
    low, high = torch.aminmax(values.movedim(1, 0).reshape(channels, -1), dim=1)
    variance = torch.where(low == high, 0.0, invstd.double().square().reciprocal())
    first, second = rest * count, (variance + rest.square()) * count
    two_parts = has_two_parts(x.dtype)
    return Moments.from_pivot(pivot.new_full((), count), pivot, first, second, two_parts).pack()


def normalize(
    x: Tensor, message: Tensor, how: Forward, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`syncbn.kernels.reference.normalize`."""
    group = Moments.unpack(message, x.shape[1])
    if how.running is not None:
        move_running(group, how.running)
    found = statistics(group, how.eps)
    y = _affine(x, Transform(found, how.weight, how.bias))
    if residual is not None:
        y.add_(residual)
    return y.relu_() if how.relu else y, found


def backward_reduce(
    dy: Tensor, x: Tensor, transform: Transform, wanted: Wanted = (None, None)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`syncbn.kernels.reference.backward_reduce`."""
    sums = _gradient_sums(dy, x, transform)
    return sums, *parameter_gradients(sums, *wanted)


def backward_elemt(
    dy: Tensor, x: Tensor, transform: Transform, sums: Tensor, may_overwrite: bool = False
) -> Tensor:
    """See :func:`syncbn.kernels.reference.backward_elemt`."""
    if x.numel() == 0:
        return torch.empty_like(x)
    compute = compute_dtype(x.dtype)
    invstd, weight = transform.invstd, transform.weight
    pivot, rest = split_mean(transform.mean, x.dtype)
    mean_dy, mean_dy_xhat = (sums / transform.values).view(2, -1)
    mean_dy_xmu = mean_dy_xhat / invstd
    # ATen: (dy - sum_dy/count - (x - mean) * sum_dy_xmu/count * invstd^2) * invstd * weight, with
    # an int32 count of its own: the division is done here, in float64, and it is told "1".
    offset = mean_dy - rest * invstd.square() * mean_dy_xmu
    one = torch.ones(1, dtype=torch.int32, device=x.device)
    return torch.batch_norm_backward_elemt(
        _through_relu(dy, x, transform),
        x,
        pivot,
        invstd.to(compute),
        None if weight is None else weight.to(compute),
        offset.to(compute),
        mean_dy_xmu.to(compute),
        one,
    )


def _gradient_sums(dy: Tensor, x: Tensor, transform: Transform) -> Tensor:
    if x.numel() == 0:
        return torch.zeros(2 * x.shape[1], dtype=torch.float64, device=x.device)
    pivot, rest = split_mean(transform.mean, x.dtype)
    invstd = transform.invstd
    gradient = _through_relu(dy, x, transform)
    if x.dtype != pivot.dtype:
        # Of contiguous half types this kernel's sums come out as rounded as its inputs.
        gradient, x = gradient.to(pivot.dtype), x.to(pivot.dtype)
    sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
        gradient, x, pivot, invstd.to(pivot.dtype), None, True, False, False
    )
    sum_dy, sum_dy_xmu = sum_dy.double(), sum_dy_xmu.double()
    return torch.cat([sum_dy, (sum_dy_xmu - rest * sum_dy) * invstd])


def _affine(x: Tensor, t: Transform) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    pivot, scale, shift = normalize_coefficients(t.mean, t.invstd, t.weight, t.bias, x.dtype)
    # (x - pivot) * 1 * scale + shift; eps is not used by this kernel.
    return torch.batch_norm_elemt(x, scale, shift, pivot, torch.ones_like(pivot), 0.0)


def _through_relu(dy: Tensor, x: Tensor, transform: Transform) -> Tensor:
    """Return what comes through the ReLU, if there is one, in the layout of x."""
    if transform.relu:
        dy = torch.ops.aten.threshold_backward(dy, _affine(x, transform), 0)
    return _like(dy, x)


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy in the memory layout of x: the channels_last kernels need both alike."""
    if dy.stride() == x.stride():
        return dy
    return torch.empty_like(x, dtype=dy.dtype).copy_(dy)
