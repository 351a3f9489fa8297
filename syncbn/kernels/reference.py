"""The reference kernel: plain torch formulas, differentiable and traceable, on any device.

Compilers trace this kernel, and every other kernel is tested against it. Half inputs are computed
in float32; sums are combined in float64.
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
    RunningStats,
    Saved,
    parameter_gradients,
    undo_activation,
)
from syncbn.kernels.coefficients import (
    affine,
    backward_coefficients,
    compute_dtype,
    per_channel,
    reduced_dims,
    split_mean,
    split_statistics,
)
from syncbn.moments import Moments, has_two_parts


class ReferenceKernel(Kernel):
    """The formulas of batch normalization in operations of torch."""

    def moments(self, x: Tensor) -> Tensor:
        """See :meth:`Kernel.moments`.

        The sums are taken around the local mean and moved to the origin in float64, so that squares
        of a large mean never meet a small variance in float32.
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

    def normalize(
        self, x: Tensor, moments: Tensor, args: NormalizeArgs, residual: Tensor | None = None
    ) -> tuple[Tensor, Saved]:
        """See :meth:`Kernel.normalize`."""
        group = Moments.unpack(moments, x.shape[1])
        statistics = compute_statistics(group, args)
        y = affine(x, statistics, args.weight, args.bias)
        y = y if residual is None else y + residual
        y = apply_activation(y, args.activation).to(x.dtype)
        values = None if residual is None or args.activation is None else y
        return y, Saved(x, args.weight, args.bias, statistics, values, args.activation)

    def backward_reduce(self, dy: Tensor, saved: Saved, output_mask: OutputMask) -> Reduced:
        """See :meth:`Kernel.backward_reduce`."""
        dy, _ = undo_activation(dy, saved)
        x, dims = saved.x, reduced_dims(saved.x)
        mean, invstd, _ = split_statistics(saved.statistics)
        pivot, rest = split_mean(mean, x.dtype)
        gradient = _recompute_activation(dy, saved).to(pivot.dtype)
        sum_dy = gradient.sum(dims).double()
        sum_dy_xmu = (gradient * (x - per_channel(pivot, x))).sum(dims).double()
        sums = torch.cat([sum_dy, (sum_dy_xmu - rest * sum_dy) * invstd])
        dresidual = dy if output_mask[3] else None
        return Reduced(sums, *parameter_gradients(sums, saved, output_mask), dresidual, dy)

    def backward_elemt(self, saved: Saved, reduced: Reduced, sums: Tensor) -> Tensor:
        """See :meth:`Kernel.backward_elemt`."""
        x, dy = saved.x, _recompute_activation(reduced.dy, saved)
        coefficients = torch.stack(
            backward_coefficients(saved.statistics, saved.weight, sums, x.dtype)
        )
        pivot, slope, offset, scale = (per_channel(v, x) for v in coefficients.unbind())
        return ((dy - offset - (x - pivot) * slope) * scale).to(x.dtype)


def compute_statistics(group: Moments, args: NormalizeArgs) -> Tensor:
    """Return ``[mean (C) | invstd (C) | count (1)]``, float64; update the running statistics.

    Args:
        group: moments of the whole group.
        args: arguments of the forward pass.
    """
    if args.running is not None:
        update_running_stats(group, args.running)
    mean, m2 = group.mean_and_m2()
    invstd = (m2 / group.count.clamp(min=1) + args.eps).rsqrt()
    return torch.cat([mean, invstd, group.count.reshape(1)])


def update_running_stats(group: Moments, running: RunningStats) -> None:
    """Count a batch and update running statistics in place, without a host sync.

    ``running <- (1 - momentum) running + momentum batch``, with the unbiased variance, as torch.
    A batch with fewer than two values per channel has no variance and is not recorded: when every
    rank is empty, statistics and counter stay as they are, and no NaN reaches them.

    Args:
        group: moments of the whole group.
        running: running statistics.
    """
    mean, var, num_batches_tracked, momentum = running
    has_variance = group.count > 1
    weight: float | Tensor = 0.0 if momentum is None else momentum
    with torch.no_grad():
        if num_batches_tracked is not None:
            num_batches_tracked.add_(has_variance)
            if momentum is None:
                # A tensor: .item() would synchronize a GPU.
                weight = num_batches_tracked.clamp(min=1).double().reciprocal()
        batch_mean, m2 = group.mean_and_m2()
        batch_var = m2 / (group.count - 1).clamp(min=1)
        for average, batch in ((mean, batch_mean), (var, batch_var)):
            if average is not None:
                # In float64, so that a half buffer rounds once.
                change = torch.where(has_variance, batch - average, 0.0) * weight
                average.copy_(average + change)


def _recompute_activation(dy: Tensor, saved: Saved) -> Tensor:
    """Return dy before an activation without a residual, in the compute dtype."""
    if saved.activation is None or saved.activation_values is not None:
        return dy
    z = affine(saved.x, saved.statistics, saved.weight, saved.bias)
    return activation_backward(dy.to(z.dtype), z, saved.activation)
