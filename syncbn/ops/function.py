"""The autograd function: batch norm over the values of every rank of a group."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from syncbn import modes
from syncbn.distributed import collectives, fingerprint
from syncbn.kernels.base import NormalizeArgs, Saved
from syncbn.moments import add_packed
from syncbn.ops import activation_checkpoint
from syncbn.ops.composite import composite_backward, vmap_rows
from syncbn.ops.params import (
    BatchNormParams,
    check_value_count,
    compute_moments,
    describe_all_reduce,
)


class SyncBatchNormFunction(torch.autograd.Function):
    """Normalize with the statistics of the whole group; differentiate through them.

    Shapes on rank r of R (N_r and S_r, the samples and the values per sample and channel, may
    differ between ranks and may be zero)::

        x, y, dy, dx     [N_r, C, *]   any floating dtype
        weight, bias     [C]           any floating dtype; equal on every rank
        mean, invstd     [C]           float64; equal on every rank
        n_r = N_r S_r                  values per channel here;  n = sum_r n_r

    Forward, one all-reduce of 2C + 1 float64 values (4C + 1 for float64 inputs, whose sums have two
    parts: :class:`syncbn.moments.Moments`)::

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

    so two values per channel cross the wire, in one all-reduce of 2C float64 values::

        [sum_r sum(dy) | sum_r sum(dy xhat)]  <-  all_reduce [sum(dy) | sum(dy xhat)]

    The same two values *before* the all-reduce are dL/dbias and dL/dweight of this rank's loss
    terms. They stay local: DistributedDataParallel averages parameter gradients itself, and summing
    them here would count each rank R times.

    With a residual r (shape of x) and an activation f::

        z = xhat weight + bias + r;  y = f(z)
        dr = dy f'(z);  dx, dweight and dbias as above, with dr for dy

    Saved are x (alive anyway, as the output of the previous layer) and per-channel values: mean,
    invstd, n, weight, bias. Neither xhat nor z is saved: both are one multiply-add away from x.
    After a residual, f is piecewise linear: f'(z) is read from a bit per value, or from y, which
    the next layer keeps alive.

    A rank without values takes part in both all-reduces with zeros; n = 0 on all ranks gives mean 0
    and empty outputs. Nothing is read back to the host.

    With ``create_graph=True`` and under transforms of ``torch.func``, gradients come from
    :mod:`syncbn.ops.composite`.

    Reference: Ioffe and Szegedy, Batch Normalization, 2015, section 3 (the transform and its
    gradients), over the union of the ranks' batches.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        params: BatchNormParams,
    ) -> Tensor:
        """Return y; update the running statistics.

        Raises:
            ValueError: a single value per channel in the whole group, on CPU.
        """
        kernel, running = params.kernel, params.running
        if _needs_moments(params):
            moments, is_new = _reduce_moments(x, params)
            running = running if is_new else None
            args = NormalizeArgs(params.eps, weight, bias, params.activation, running)
            y, saved = kernel.normalize(x, moments, args, residual)
        else:
            args = NormalizeArgs(params.eps, weight, bias, params.activation, running)
            y, saved = kernel.forward_local(x, args, residual)
        # Two values per channel on this rank are enough.
        if params.mask_fill is not None or x.numel() <= x.shape[1]:
            check_value_count(x, saved.statistics[-1], params)
        ctx.save_for_backward(*saved.tensors())
        ctx.saved_constants = saved.constants()
        number = fingerprint.count_checked(params.group)
        ctx.params = params._replace(call_number=number) if number else params
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, this rank's dweight and dbias, and dresidual."""
        params: BatchNormParams = ctx.params
        saved = Saved(*ctx.saved_tensors, *ctx.saved_constants)
        output_mask = ctx.needs_input_grad[:4]
        if not torch.compiler.is_compiling():
            if modes.is_grads_batched(dy):
                function = partial(
                    composite_backward, saved=saved, params=params, output_mask=output_mask
                )
                return *vmap_rows(function, dy), None
            if torch.is_grad_enabled() or modes.in_functorch_transform() or modes.in_forward_ad():
                return *composite_backward(dy, saved, params, output_mask), None
        kernel = params.kernel
        if params.group is None and output_mask[0]:
            return *kernel.backward_local(dy, saved, output_mask), None
        reduced = kernel.backward_reduce(dy, saved, output_mask)
        # Also on ranks that need no dx: the all-reduce is collective.
        label = describe_all_reduce(params, "backward", saved.x)
        sums = collectives.all_reduce(reduced.sums, params.group, label)
        dx = kernel.backward_elemt(saved, reduced, sums) if output_mask[0] else None
        return dx, reduced.dweight, reduced.dbias, reduced.dresidual, None


def _needs_moments(params: BatchNormParams) -> bool:
    """Return whether a group, a mask, pending moments or a checkpoint phase needs the moments."""
    if params.group is not None or params.mask_fill is not None or params.pending is not None:
        return True
    return not torch.compiler.is_compiling() and activation_checkpoint.current() is not None


def _reduce_moments(x: Tensor, params: BatchNormParams) -> tuple[Tensor, bool]:
    """Return the all-reduced moments, and whether they are new.

    The recomputation of a checkpointed region reuses the moments of the forward pass: there is no
    all-reduce, and neither the running statistics nor ``params.pending`` may count them again.
    """

    def compute() -> Tensor:
        moments = compute_moments(params.kernel, x, params)
        label = describe_all_reduce(params, "forward", x)
        return collectives.all_reduce(moments, params.group, label)

    phase = None if torch.compiler.is_compiling() else activation_checkpoint.current()
    if phase is None:
        moments, is_new = compute(), True
    else:
        with modes.bypass_modes(x):
            moments, is_new = phase.moments_for(compute, x, params.label)
    if is_new and params.pending is not None:
        add_packed(params.pending, moments, x.shape[1])
    return moments, is_new
