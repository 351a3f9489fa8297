"""Batch norm as a composite of differentiable operations: slower, and for any derivative.

It serves ``create_graph=True`` and higher orders, forward-mode differentiation and the transforms
of ``torch.func``. All of them see the reference formulas and a differentiable all-reduce.

A transform may also begin after the forward pass: ``torch.func.vmap`` over ``torch.autograd.grad``,
and ``torch.autograd.grad(is_grads_batched=True)``. Then the arriving gradients are batched tensors
without memory, which other kernels cannot read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from syncbn import modes
from syncbn.distributed.collectives import differentiable_all_reduce
from syncbn.kernels import REFERENCE
from syncbn.kernels.base import Gradients, NormalizeArgs, OutputMask, Saved
from syncbn.kernels.reference import update_running_stats
from syncbn.moments import Moments, add_packed
from syncbn.ops import activation_checkpoint
from syncbn.ops.params import (
    BatchNormParams,
    check_value_count,
    compute_moments,
    describe_all_reduce,
)


def composite_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    params: BatchNormParams,
    direction: str = "forward",
) -> Tensor:
    """Return the output; update the running statistics.

    Args:
        x: input, shape ``[N, C, *]``.
        weight: scale per channel, shape ``[C]``, or None.
        bias: shift per channel, shape ``[C]``, or None.
        residual: tensor of x's shape and dtype, or None.
        params: the other arguments.
        direction: name of the pass in the label of the all-reduce.

    Raises:
        RuntimeError: running statistics would be updated under a transform of ``torch.func``.
    """
    updates = params.running is not None or params.pending is not None
    if updates and modes.in_functorch_transform():
        raise RuntimeError(
            f"{params.label}: running statistics cannot be updated under a transform of "
            "torch.func; torch.func.replace_all_batch_norm_modules_(model) turns them off, and so "
            "does track_running_stats=False"
        )
    label = describe_all_reduce(params, direction, x)
    moments = compute_moments(REFERENCE, x, params)
    moments = differentiable_all_reduce(moments, params.group, label)
    if not modes.in_functorch_transform():
        _record_moments(moments.detach(), x, params)
    args = NormalizeArgs(params.eps, weight, bias, params.activation)
    return REFERENCE.normalize(x, moments, args, residual)[0]


def _record_moments(moments: Tensor, x: Tensor, params: BatchNormParams) -> None:
    """Update the running statistics, except in the recomputation of a checkpointed region."""
    if params.mask_fill is not None or x.numel() <= x.shape[1]:
        check_value_count(x, moments[-1], params)
    phase = activation_checkpoint.current()
    # The saved moments have no graph: a recomputation consumes them and uses new ones.
    is_new = phase is None or phase.moments_for(lambda: moments, x, params.label)[1]
    if is_new and params.running is not None:
        update_running_stats(Moments.unpack(moments, x.shape[1]), params.running)
    if is_new and params.pending is not None:
        add_packed(params.pending, moments, x.shape[1])


def composite_backward(
    dy: Tensor, saved: Saved, params: BatchNormParams, output_mask: OutputMask
) -> Gradients:
    """Return differentiable gradients of x, weight, bias and residual.

    For ``create_graph=True`` the forward pass is computed again, with an all-reduce: the saved
    statistics have no graph. All rows of a batched dy share an all-reduce.

    Args:
        dy: gradient of the output, shape of x; may be batched.
        saved: values of the forward pass.
        params: arguments of the forward pass.
        output_mask: requested gradients.
    """
    activation = saved.activation
    if activation is not None and activation.is_piecewise_linear:
        # Its derivative is a constant of this pass.
        unit = params.kernel.unit_derivative(saved)
        dy = torch.where(
            unit, dy, dy * activation.negative_slope if activation.negative_slope else 0
        )
        saved = saved._replace(activation=None, activation_values=None)
    if not torch.is_grad_enabled():
        return _first_order(dy, saved, params, output_mask)
    plain = params._replace(activation=saved.activation, running=None, pending=None)
    parameters = {"weight": saved.weight, "bias": saved.bias}
    tensors = {name: t for name, t in parameters.items() if t is not None}

    def forward(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        weight, bias = tensors.get("weight"), tensors.get("bias")
        return composite_batch_norm(x, weight, bias, None, plain, "double backward")

    # With respect to x on every rank: a rank that needs no dx still takes part in the all-reduce.
    with _without_saved_tensor_hooks():
        vjp_function: Any = torch.func.vjp(forward, saved.x, tensors)[1]
        dx, gradients = vjp_function(dy)
    computed = dx, gradients.get("weight"), gradients.get("bias"), dy
    needed = [t if need else None for t, need in zip(computed, output_mask, strict=True)]
    return needed[0], needed[1], needed[2], needed[3]


def _first_order(
    dy: Tensor, saved: Saved, params: BatchNormParams, output_mask: OutputMask
) -> Gradients:
    """Return gradients without a graph, in operations that a transform can batch."""
    reduced = REFERENCE.backward_reduce(dy, saved, output_mask)
    label = describe_all_reduce(params, "backward", saved.x)
    sums = differentiable_all_reduce(reduced.sums, params.group, label)
    dx = REFERENCE.backward_elemt(saved, reduced, sums) if output_mask[0] else None
    return dx, reduced.dweight, reduced.dbias, reduced.dresidual


@contextmanager
def _without_saved_tensor_hooks() -> Iterator[None]:
    """Suspend hooks of saved tensors (offloading), which ``torch.func.vjp`` refuses."""
    hooks: list[Any] = []
    while top := torch._C._autograd._top_saved_tensors_default_hooks(False):
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def vmap_rows(function: Callable[[Tensor], Gradients], dy: Tensor) -> Gradients:
    """Return the gradients for all rows of a batched dy.

    ``torch.func.vmap`` replaces the older vmap, which has no rule for the all-reduce: each row
    would need its own.

    Args:
        function: function of the dy of one row.
        dy: gradient of the output for which :func:`syncbn.modes.is_grads_batched` is true.
    """
    rows, level = modes.unwrap_batched(dy)
    present: list[bool] = []

    def without_none(dy: Tensor) -> tuple[Tensor, ...]:
        results = function(dy)
        present[:] = [result is not None for result in results]
        return tuple(result for result in results if result is not None)

    batched: Any = torch.func.vmap(without_none)(rows)
    results = iter(batched)
    gradients = [torch._add_batch_dim(next(results), 0, level) if p else None for p in present]
    return gradients[0], gradients[1], gradients[2], gradients[3]
