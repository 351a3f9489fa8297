"""The kernel on CUDA without Triton: ATen's batch-norm kernels, which exist on CUDA alone.

ATen computes with a float32 mean. Passing it the pivot of :mod:`syncbn.kernels.coefficients` as
"mean" and correcting the per-channel values keeps the precision of the split mean. No call
synchronizes with the host, and all accept tensors without elements. ATen has no fused residual
and activation: they are separate operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.kernels.activations import activation_backward, apply_activation
from syncbn.kernels.base import (
    Kernel,
    NormalizeArgs,
    OutputMask,
    Reduced,
    Saved,
    parameter_gradients,
    undo_activation,
)
from syncbn.kernels.coefficients import (
    compute_dtype,
    forward_coefficients,
    per_channel,
    reduced_dims,
    split_mean,
    split_statistics,
)
from syncbn.kernels.reference import compute_statistics
from syncbn.moments import Moments, get_packed_size, has_two_parts


class AtenCudaKernel(Kernel):
    """Calls of ``torch.batch_norm_stats``, ``batch_norm_elemt`` and their backward functions."""

    def unsupported_reason(self, x: Tensor) -> str | None:
        """See :meth:`Kernel.unsupported_reason`."""
        return None if x.is_cuda else f"does not support {x.device.type!r} tensors"

    def moments(self, x: Tensor) -> Tensor:
        """See :meth:`Kernel.moments`."""
        channels, dims = x.shape[1], reduced_dims(x)
        count = x.numel() // channels
        if count == 0:
            size = get_packed_size(channels, x.dtype)
            return torch.zeros(size, dtype=torch.float64, device=x.device)
        if x.dtype in (torch.float16, torch.bfloat16):
            # A half type cannot hold a variation that its mean dwarfs: no shift is needed.
            values, pivot = x, torch.zeros(channels, dtype=torch.float64, device=x.device)
        else:
            # The mean of one sample; a single value may be padding, far from the rest.
            first = x[0].reshape(channels, -1).mean(1)
            values = x - per_channel(first, x)
            pivot = first.double()
        # eps = 0 to recover the whole variance; ATen returns invstd = 0 for a constant channel, and
        # for one whose variance is infinite.
        mean, invstd = torch.batch_norm_stats(values, 0.0)
        rest = mean.double()
        # Not aminmax, which takes one dimension: its input would be a copy.
        low, high = values.amin(dims), values.amax(dims)
        variance = torch.where(low == high, 0.0, invstd.double().square().reciprocal())
        first, second = rest * count, (variance + rest.square()) * count
        two_parts = has_two_parts(x.dtype)
        return Moments.from_pivot(pivot.new_full((), count), pivot, first, second, two_parts).pack()

    def normalize(
        self, x: Tensor, moments: Tensor, args: NormalizeArgs, residual: Tensor | None = None
    ) -> tuple[Tensor, Saved]:
        """See :meth:`Kernel.normalize`."""
        statistics = compute_statistics(Moments.unpack(moments, x.shape[1]), args)
        saved = Saved(x, args.weight, args.bias, statistics, None, args.activation)
        y = _affine(saved)
        if residual is not None:
            y.add_(residual)
        y = apply_activation(y, args.activation)
        values = None if residual is None or args.activation is None else y
        return y, saved._replace(activation_values=values)

    def backward_reduce(self, dy: Tensor, saved: Saved, output_mask: OutputMask) -> Reduced:
        """See :meth:`Kernel.backward_reduce`."""
        dy, _ = undo_activation(dy, saved)
        sums = _reduce(_recompute_activation(dy, saved), saved)
        dresidual = dy if output_mask[3] else None
        return Reduced(sums, *parameter_gradients(sums, saved, output_mask), dresidual, dy)

    def backward_elemt(self, saved: Saved, reduced: Reduced, sums: Tensor) -> Tensor:
        """See :meth:`Kernel.backward_elemt`."""
        x, weight = saved.x, saved.weight
        if x.numel() == 0:
            return torch.empty_like(x)
        compute = compute_dtype(x.dtype)
        mean, invstd, count = split_statistics(saved.statistics)
        pivot, rest = split_mean(mean, x.dtype)
        mean_dy, mean_dy_xhat = (sums / count).view(2, -1)
        mean_dy_xmu = mean_dy_xhat / invstd
        # ATen: (dy - sum_dy/count - (x - mean) * sum_dy_xmu/count * invstd^2) * invstd * weight,
        # with an int32 count. The division is done here, in float64, and the count is 1.
        offset = mean_dy - rest * invstd.square() * mean_dy_xmu
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(
            _recompute_activation(reduced.dy, saved),
            x,
            pivot,
            invstd.to(compute),
            None if weight is None else weight.to(compute),
            offset.to(compute),
            mean_dy_xmu.to(compute),
            one,
        )


def _reduce(dy: Tensor, saved: Saved) -> Tensor:
    """Return ``[sum(dy) | sum(dy * xhat)]``, float64, shape ``[2C]``."""
    x = saved.x
    if x.numel() == 0:
        return torch.zeros(2 * x.shape[1], dtype=torch.float64, device=x.device)
    mean, invstd, _ = split_statistics(saved.statistics)
    pivot, rest = split_mean(mean, x.dtype)
    if x.dtype != pivot.dtype:
        # With contiguous half types this ATen kernel rounds its sums to the input's dtype.
        dy, x = dy.to(pivot.dtype), x.to(pivot.dtype)
    sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
        dy, x, pivot, invstd.to(pivot.dtype), None, True, False, False
    )
    sum_dy, sum_dy_xmu = sum_dy.double(), sum_dy_xmu.double()
    return torch.cat([sum_dy, (sum_dy_xmu - rest * sum_dy) * invstd])


def _affine(saved: Saved) -> Tensor:
    """Return ``(x - mean) * invstd * weight + bias`` in x's dtype."""
    x = saved.x
    if x.numel() == 0:
        return torch.empty_like(x)
    mean, invstd, _ = split_statistics(saved.statistics)
    pivot, scale, shift = forward_coefficients(mean, invstd, saved.weight, saved.bias, x.dtype)
    # (x - pivot) * 1 * scale + shift; this ATen kernel ignores eps.
    return torch.batch_norm_elemt(x, scale, shift, pivot, torch.ones_like(pivot), 0.0)


def _recompute_activation(dy: Tensor, saved: Saved) -> Tensor:
    """Return dy before an activation without a residual, in the memory layout of x."""
    if saved.activation is not None and saved.activation_values is None:
        dy = activation_backward(dy, _affine(saved), saved.activation)
    if dy.stride() == saved.x.stride():
        return dy
    # ATen's channels_last kernels need both tensors in one layout.
    return torch.empty_like(saved.x, dtype=dy.dtype).copy_(dy)
