"""The backward pass, and its own: gradients of gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import modes
from syncbn.distributed import collectives
from syncbn.kernels import Transform, Wanted, alone, gated
from syncbn.kernels.reference import affine
from syncbn.kernels.second_order import second_elemt, second_reduce
from syncbn.ops import batched_rows as rows
from syncbn.ops import composite as any_order
from syncbn.ops.params import Call

# Bytes of an input whose dy is read once more in less time than a message takes: by bandwidth, in
# some 20 microseconds on an A100, 8 on an H200.
BESIDE = 2**25


class FirstOrder(NamedTuple):
    """What the backward pass finds.

    Attributes:
        dx: shape and dtype of x; None if it is not needed.
        dweight: this rank's, of the weight's dtype; None if it is not needed.
        dbias: this rank's, of the bias's dtype; None if it is not needed.
        dresidual: shape and dtype of x; None if it is not needed.
        mine: ``[sum(dy) | sum(dy xhat)]`` over this rank, float64 ``[2C]``; None unless it is kept.
        sums: the same over the group; None unless it is kept.
    """

    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual: Tensor | None
    mine: Tensor | None = None
    sums: Tensor | None = None


def first_order(
    dy: Tensor,
    x: Tensor,
    transform: Transform,
    call: Call,
    needs: tuple[bool, ...],
    may_overwrite: bool = False,
    gate: Tensor | None = None,
    keep_sums: bool = False,
) -> FirstOrder:
    """Return the gradients of x, weight, bias and residual.

    Args:
        dy: gradient of the output, shape and dtype of x.
        x: shape ``[N, C, *]``.
        transform: of the forward pass, without residual.
        call: of the forward pass.
        needs: whether x, weight, bias and the residual need theirs.
        may_overwrite: nobody needs dy any more.
        gate: of a gated kernel, if dy has yet to go through the ReLU after a residual.
        keep_sums: whether the sums are wanted; not of a dy that has yet to.
    """
    kernel, (needs_x, needs_weight, needs_bias, needs_residual) = call.kernel, needs[:4]
    wanted = transform.weight if needs_weight else None, transform.bias if needs_bias else None
    if gate is not None:
        assert not keep_sums
        needed = needs_x, needs_residual
        return _first_order_gated(dy, gate, x, transform, wanted, call, needed, may_overwrite)
    over = may_overwrite and not needs_residual
    dresidual = dy if needs_residual else None
    if call.group is None and needs_x:
        both = alone.backward(kernel, dy, x, transform, wanted, over, keep_sums)
        total, dx, dweight, dbias = both
        return FirstOrder(dx, dweight, dbias, dresidual, total, total)
    mine, dweight, dbias = kernel.backward_reduce(dy, x, transform, wanted)
    # The all-reduce works in place. It is also for ranks that need no dx: others wait for theirs.
    message = mine.clone() if keep_sums else mine
    sums = collectives.all_reduce(message, call.group, call.about("backward", x))
    last = kernel.backward_elemt(dy, x, transform, sums, over) if needs_x else None
    return FirstOrder(last, dweight, dbias, dresidual, mine, sums)


def _first_order_gated(
    dy: Tensor,
    gate: Tensor,
    x: Tensor,
    transform: Transform,
    wanted: Wanted,
    call: Call,
    needs: tuple[bool, bool],
    may_overwrite: bool,
) -> FirstOrder:
    """Return the gradients where dy has yet to go through the ReLU after a residual.

    What comes through is the residual's gradient, which does not depend on the message. So it is
    written beside that, for one more reading of dy and the gate; where this would take longer than
    a message may, and in a group of one, by the pass that reads them anyway.

    Args:
        dy: as for :func:`first_order`, and so are those that are not here.
        gate: of the forward pass.
        x: shape ``[N, C, *]``.
        transform: of the forward pass, without residual.
        wanted: weight and bias; None for each whose gradient is not.
        call: of the forward pass.
        needs: whether x and the residual need theirs.
        may_overwrite: nobody needs dy any more.
    """
    kernel, (needs_x, needs_residual) = call.kernel, needs
    assert gated.is_gated(kernel)
    given = dy, gate, x, transform, wanted, may_overwrite
    if call.group is None and needs_x:
        both = kernel.backward_alone_gated(*given, keep_gated=needs_residual)
        dresidual, dx, dweight, dbias = both
        return FirstOrder(dx, dweight, dbias, dresidual)
    is_wanted = needs_x or needs_residual
    is_beside = is_wanted and call.group is not None and x.nbytes <= BESIDE
    write = is_wanted and not is_beside
    through, mine, dweight, dbias = kernel.backward_reduce_gated(*given, write=write)
    label, over = call.about("backward", x), not needs_residual
    if is_beside:
        message = collectives.all_reduce_async(mine, call.group, label)
        through = kernel.through_gate(through, gate, x)
        sums = message.wait()
    else:
        sums = collectives.all_reduce(mine, call.group, label)
    last = kernel.backward_elemt(through, x, transform, sums, over) if needs_x else None
    return FirstOrder(last, dweight, dbias, through if needs_residual else None)


class SyncBatchNormBackward(torch.autograd.Function):
    """The backward pass as a function of dy, x and weight; differentiate through it.

    It is used where the graph of the backward pass is wanted (``create_graph=True``). The names
    are those of :class:`~syncbn.ops.batch_norm.SyncBatchNormFunction`; g is dy where the ReLU lets it
    pass, a is invstd. Forward, on rank r::

        dx = a weight (g - S0/n - xhat S1/n),   S0 = sum(g),  S1 = sum(g xhat)   over the group
        dweight_r = sum_r(g xhat),  dbias_r = sum_r(g),  dresidual = g

    Backward. Let h, u_r, v_r, t be the gradients that arrive at dx, dweight_r, dbias_r, dresidual,
    and Q = sum_r [sum_r(h dx) + u_r dweight_r + v_r dbias_r + sum_r(t g)] what they are of. With
    the sums over the group H0 = sum(h), H1 = sum(h xhat), HG = sum(h g)::

        sum(h dx) = a weight K,   K = HG - S0 H0/n - S1 H1/n

    and the same with sums over this rank alone is its share of dQ/dweight, times weight::

        dQ/dweight_r = a (HG_r - S0 H0_r/n - S1 H1_r/n)
        dQ/dg_i      = a weight (h_i - H0/n - xhat_i H1/n) + u_r xhat_i + v_r + t_i

    x acts through xhat and through a. The partial derivative by xhat_i, a kept, and its sums::

        q_i         = u_r g_i - a weight (g_i H1 + h_i S1)/n
        sum(q)      = U0 - a weight (S0 H1 + H0 S1)/n     with U0 = sum over ranks of u_r S0_r
        sum(q xhat) = U1 - 2 a weight S1 H1/n             with U1 = sum over ranks of u_r S1_r

    With dxhat_j/dx_i = a (delta_ij - 1/n - xhat_i xhat_j/n) and da/dx_i = -a^2 xhat_i/n::

        dQ/dx_i = a (q_i - sum(q)/n - xhat_i sum(q xhat)/n) - a^2 weight K xhat_i/n

    So five numbers a channel cross the wire, one message of 5C float64 numbers::

        [H0 | H1 | HG | U0 | U1]  <-  all_reduce [H0_r | H1_r | HG_r | u_r S0_r | u_r S1_r]

    Where the ReLU is closed, gradients of dy are zero. The bias has none. Higher orders are left to
    :mod:`syncbn.ops.composite`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Tensor,
        y: Tensor | None,
        call: Call,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Return dx, this rank's dweight and dbias, and dresidual."""
        transform = Transform(statistics, weight, bias, False)
        closed = None
        if call.relu:
            closed = (affine(x, transform) if y is None else y) <= 0
        g = dy if closed is None else dy.masked_fill(closed, 0)
        found = first_order(g, x, transform, call, needs, keep_sums=True)
        ctx.save_for_backward(dy, x, weight, statistics, found.mine, found.sums, closed)
        ctx.call = call
        return found[:4]

    @staticmethod
    def backward(
        ctx: Any, h: Tensor | None, u: Tensor | None, v: Tensor | None, t: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of dy, x and weight."""
        dy, x, weight, statistics, first_mine, first, closed = ctx.saved_tensors
        call: Call = ctx.call

        def transformed(*arriving: Tensor | None) -> tuple[Tensor | None, ...]:
            return any_order.transformed_second(dy, x, weight, closed, call, arriving)

        if any(gradient is not None and rows.is_batched(gradient) for gradient in (h, u, v, t)):
            return rows.over_rows(transformed, h, u, v, t)
        if modes.is_transformed():
            return transformed(h, u, v, t)
        if torch.is_grad_enabled():
            return any_order.second(dy, x, weight, closed, call, (h, u, v, t))
        channels, transform = x.shape[1], Transform(statistics, weight)
        g = dy if closed is None else dy.masked_fill(closed, 0)
        h = torch.zeros_like(x) if h is None else h
        u, v = (first.new_zeros(channels) if w is None else w.double() for w in (u, v))
        mine = second_reduce(h, g, x, transform)
        message = torch.cat([mine, u * first_mine[:channels], u * first_mine[channels:]])
        label = call.about("double backward", x)
        message = collectives.all_reduce(message, call.group, label)
        found = second_elemt(h, g, x, transform, first, mine, message, u, v)
        ddy = found.dy if t is None else found.dy + t
        if closed is not None:
            ddy = ddy.masked_fill(closed, 0)
        dweight = None if weight is None else found.weight.to(weight.dtype)
        return ddy, found.x, dweight, None, None, None, None, None
