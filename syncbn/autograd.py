"""The one autograd function: batch norm over the values of every rank of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncbn.distributed import collectives
from syncbn.kernels import Kernel
from syncbn.moments import Moments


class SyncBatchNormFunction(torch.autograd.Function):
    """Normalize with the statistics of the whole group; differentiate through them.

    Shapes on rank r of R (N_r and S_r, the samples and the values per sample and channel, may
    differ between ranks and may be zero)::

        x, y, dy, dx     [N_r, C, *]   any floating dtype
        weight, bias     [C]           any floating dtype; the same numbers on every rank
        mean, invstd     [C]           float64; equal on every rank
        n_r = N_r S_r                  values per channel here;  n = sum_r n_r

    Forward, one message of 2C + 1 float64 numbers::

        [sum_r sum(x) | sum_r sum(x^2) | n]  <-  all_reduce [sum(x) | sum(x^2) | n_r]
        mean   = sum(x) / n
        var    = sum(x^2) / n - mean^2                                 (biased)
        invstd = 1 / sqrt(var + eps)
        xhat   = (x - mean) invstd
        y      = xhat weight + bias

    Backward. The loss is the sum of the ranks' losses, L = sum_r L_r, and dy = dL/dy is local.
    x_i reaches L directly and through mean and var, on which every y of every rank depends::

        dL/dxhat_i = dy_i weight
        dL/dvar    = sum_j dL/dxhat_j (x_j - mean) (-1/2) invstd^3
        dL/dmean   = -sum_j dL/dxhat_j invstd         (the path through var vanishes: sum xhat = 0)
        dL/dx_i    = dL/dxhat_i invstd + dL/dvar 2 (x_i - mean)/n + dL/dmean / n

    with j over all values of the channel on all ranks. Collecting terms::

        dx = invstd weight (dy - sum(dy)/n - xhat sum(dy xhat)/n)

    so two numbers a channel cross the wire, one message of 2C float64 numbers::

        [sum_r sum(dy) | sum_r sum(dy xhat)]  <-  all_reduce [sum(dy) | sum(dy xhat)]

    The same two numbers *before* the all-reduce are dL/dbias and dL/dweight of this rank's loss
    terms. They stay local: DistributedDataParallel averages parameter gradients itself, and summing
    them here would count each rank R times.

    Saved are x (its memory is alive anyway, as the output of the layer before), weight, and C-sized
    mean, invstd and n. Neither xhat nor y is saved: xhat is one multiply-add away from x.

    A rank without values takes part in both messages with zeros; n = 0 on all ranks gives mean 0
    and empty outputs. No number is read back to the host.

    Reference: Ioffe and Szegedy, Batch Normalization, 2015, section 3 (the transform and its
    gradients), over the union of the ranks' batches.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: dist.ProcessGroup | None,
        kernel: Kernel,
        label: str,
    ) -> tuple[Tensor, Tensor]:
        """Return y, and the group's packed :class:`~syncbn.moments.Moments` (no gradient)."""
        message = collectives.all_reduce(
            kernel.moments(x), group, f"{label} forward, {x.dtype} input"
        )
        moments = Moments.unpack(message)
        mean = moments.mean()
        invstd = (moments.variance() + eps).rsqrt()
        y = kernel.normalize(x, mean, invstd, weight, bias)

        ctx.save_for_backward(x, weight, mean, invstd, moments.count)
        ctx.parameter_dtypes = (
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
        )
        ctx.group, ctx.kernel, ctx.label = group, kernel, label
        ctx.mark_non_differentiable(message)
        ctx.set_materialize_grads(False)
        return y, message

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return dx and this rank's dweight and dbias."""
        x, weight, mean, invstd, count = ctx.saved_tensors
        kernel: Kernel = ctx.kernel
        dy = grads[0]
        if dy is None:
            dy = torch.zeros_like(x)
        sums = kernel.backward_reduce(dy, x, mean, invstd)
        dbias, dweight = sums.view(2, -1)
        weight_dtype, bias_dtype = ctx.parameter_dtypes
        # Copies, because the all-reduce works in place.
        dweight = dweight.to(weight_dtype, copy=True) if ctx.needs_input_grad[1] else None
        dbias = dbias.to(bias_dtype, copy=True) if ctx.needs_input_grad[2] else None
        # Also when this rank needs no dx: the others wait for its share.
        sums = collectives.all_reduce(sums, ctx.group, f"{ctx.label} backward, {x.dtype} input")
        dx = None
        if ctx.needs_input_grad[0]:
            dx = kernel.backward_elemt(dy, x, mean, invstd, weight, sums, count)
        return dx, dweight, dbias, None, None, None, None
