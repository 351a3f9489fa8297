"""The autograd function: batch norm over the values of every rank of a group."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from syncbn import modes
from syncbn.kernels import Forward, Transform, alone, gated
from syncbn.kernels.layout import seen_as, view_of
from syncbn.kernels.reference import affine
from syncbn.ops import batched_rows as rows
from syncbn.ops import composite as any_order
from syncbn.ops.backward import SyncBatchNormBackward, first_order
from syncbn.ops.params import Call, group_message
from syncbn.ownership import is_unshared

#: x, weight, bias, statistics; and a gate, or the output, or None.
Saved: TypeAlias = "tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]"


class SyncBatchNormFunction(torch.autograd.Function):
    """Normalize with the statistics of the whole group; differentiate through them.

    Shapes on rank r of R (N_r and S_r, the samples and the values per sample and channel, may
    differ between ranks and may be zero)::

        x, y, dy, dx     [N_r, C, *]   any floating dtype
        weight, bias     [C]           any floating dtype; the same numbers on every rank
        mean, invstd     [C]           float64; equal on every rank
        n_r = N_r S_r                  values per channel here;  n = sum_r n_r

    Forward, one message of 2C + 1 float64 numbers (4C + 1 for float64 inputs, whose sums have two
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

    so two numbers a channel cross the wire, one message of 2C float64 numbers::

        [sum_r sum(dy) | sum_r sum(dy xhat)]  <-  all_reduce [sum(dy) | sum(dy xhat)]

    The same two numbers *before* the all-reduce are dL/dbias and dL/dweight of this rank's loss
    terms. They stay local: DistributedDataParallel averages parameter gradients itself, and summing
    them here would count each rank R times.

    With a residual r (shape of x) and a ReLU::

        y = max(xhat weight + bias + r, 0)
        dr = dy where y > 0, else 0;  dx, dweight and dbias as above, with dr in place of dy

    Saved are x (its memory is alive anyway, as the output of the layer before) and numbers by
    channel: mean, invstd, n, weight, bias. Neither xhat nor y is saved: xhat, and where y > 0, is
    one multiply-add away from x. With a residual that is a bit for each value, or y, which the next
    layer keeps (:mod:`syncbn.kernels.gated`); r is not saved.

    dx is written over dy where nobody else has dy and it is worth asking: half the memory, and on a
    CPU no page faults.

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
        residual: Tensor | None,
        call: Call,
    ) -> Tensor:
        """Return y; move the running averages.

        Raises:
            ValueError: on CPU, a single value per channel in the whole group.
        """
        kernel = call.kernel
        masks = call.relu and residual is not None
        gate = kernel.new_gate(x) if masks and gated.is_gated(kernel) else None
        how = Forward(call.eps, weight, bias, call.relu, call.running, gate)
        if call.is_alone:
            y, statistics = alone.forward(kernel, x, how, residual)
        else:
            message, is_new = group_message(x, call)
            how = how if is_new else how._replace(running=None)
            y, statistics = kernel.normalize(x, message, how, residual)
        _refuse_one_value(x, statistics, call)

        kept = y if masks and gate is None else gate
        ctx.save_for_backward(x, weight, bias, statistics, kept)
        ctx.call, ctx.view = call.numbered(), None if gate is None else view_of(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, this rank's dweight and dbias, and dresidual.

        With ``create_graph=True`` by :class:`SyncBatchNormBackward`, which has a backward pass.
        """
        if not torch.compiler.is_compiling():
            if rows.is_batched(dy):
                return *rows.over_rows(partial(_transformed_gradients, ctx), dy), None
            if modes.in_functorch_transform():
                return *_transformed_gradients(ctx, dy), None
        references = None if torch.compiler.is_compiling() else sys.getrefcount(dy)
        mine = references is not None and is_unshared(dy, references)
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        return *gradients(dy, saved, ctx.call, ctx.view, needs, mine), None


def gradients(
    dy: Tensor,
    saved: Saved,
    call: Call,
    view: tuple[int, int, int] | None,
    needs: tuple[bool, ...],
    may_overwrite: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return dx, this rank's dweight and dbias, and dresidual.

    Args:
        dy: gradient of the output, shape and dtype of x.
        saved: by the forward pass.
        call: of the forward pass.
        view: what kernels saw in x, if there is a gate.
        needs: whether x, weight, bias and the residual need theirs.
        may_overwrite: nobody needs dy any more.
    """
    x, weight, bias, statistics, kept = saved
    kernel = call.kernel
    # Hooks of saved tensors may have changed how x lies.
    x = x if view is None else seen_as(x, view)
    if torch.is_grad_enabled():
        if view is not None and gated.is_gated(kernel):
            assert kept is not None
            kept = kernel.opened(kept, x)
        given = dy, x, weight, bias, statistics, kept, call, needs
        found: tuple[Tensor | None, ...] = SyncBatchNormBackward.apply(*given)
        return found
    transform = Transform(statistics, weight, bias, call.relu and kept is None)
    if kept is not None and view is None:
        dy, may_overwrite, kept = gated.through_relu(dy, kept, may_overwrite), True, None
    return first_order(dy, x, transform, call, needs, may_overwrite, kept)[:4]


def _transformed_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and residual under a transform of `torch.func`."""
    x, weight, bias, statistics, kept = ctx.saved_tensors
    call: Call = ctx.call
    if ctx.view is not None and gated.is_gated(call.kernel):
        kept = call.kernel.opened(kept, seen_as(x, ctx.view))
    transform = Transform(statistics, weight, bias)
    closed = None
    if call.relu:
        closed = (affine(x, transform) if kept is None else kept) <= 0
    needs = ctx.needs_input_grad
    return any_order.transformed_first(dy, x, transform, closed, call, needs)


def _refuse_one_value(x: Tensor, statistics: Tensor, call: Call) -> None:
    # With more values here there are more in the group, unless some do not count. On other devices
    # reading the count would stall them; everywhere kernels keep such a batch out of the averages.
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return
    if call.filling is None and x.numel() > x.shape[1]:
        return
    if statistics[-1].item() == 1:
        raise ValueError(
            f"{call.label}: got a single value per channel in the whole group (input of shape "
            f"{tuple(x.shape)} on this rank); expected at least two in training, since the "
            "variance of one value is zero"
        )
