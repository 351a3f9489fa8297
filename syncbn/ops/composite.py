"""Batch norm that autograd differentiates step by step: slower, for whatever asks for more.

Derivatives of third and higher order, forward-mode differentiation, and the transforms of
`torch.func`: all of them see the formulas of :mod:`syncbn.kernels.reference` and a sum over ranks.

A transform may also begin after the forward pass: ``torch.func.vmap`` over
``torch.autograd.grad``, and ``torch.autograd.grad(is_grads_batched=True)``. Then the gradients that
arrive are batched tensors without memory, which other kernels cannot read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncbn import modes
from syncbn.distributed.collectives import differentiable_all_reduce
from syncbn.kernels import Forward, Transform, reference
from syncbn.moments import Moments, add_packed
from syncbn.ops.params import Call, moments

# Of the function whose gradients second() returns.
_ARGUMENTS = 8


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> Tensor:
    """Return y; move the running averages.

    Raises:
        RuntimeError: there are running averages under a transform of `torch.func`.
    """
    moves = call.running is not None or call.pending is not None
    if moves and modes.is_transformed():
        raise RuntimeError(
            f"{call.label}: running averages cannot be moved under a transform of torch.func; "
            "torch.func.replace_all_batch_norm_modules_(model) turns them off, and so does "
            "track_running_stats=False"
        )
    message = moments(reference.moments, x, call)
    message = differentiable_all_reduce(message, call.group, call.about("forward", x))
    if call.running is not None:
        group = Moments.unpack(message.detach(), x.shape[1])
        reference.move_running(group, call.running)
    if call.pending is not None:
        add_packed(call.pending, message.detach(), x.shape[1])
    how = Forward(call.eps, weight, bias, call.relu)
    return reference.normalize(x, message, how, residual)[0]


def second(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    closed: Tensor | None,
    call: Call,
    arriving: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Return what :meth:`syncbn.ops.backward.SyncBatchNormBackward.backward` does.

    Args:
        dy: gradient of the output.
        x: shape ``[N, C, *]``.
        weight: shape ``[C]``, or None.
        closed: where the ReLU is, or None.
        call: parameters of the forward pass.
        arriving: gradients of dx, dweight, dbias and dresidual.
    """
    dy, x = _apart(dy), _apart(x)
    weights = [] if weight is None else [_apart(weight)]
    bias = x.new_zeros(x.shape[1], requires_grad=True)
    g = dy if closed is None else dy.masked_fill(closed, 0)
    plain = call._replace(relu=False, running=None, pending=None)
    y = forward(x, weights[0] if weights else None, bias, None, plain)
    dx, dbias, *dweights = torch.autograd.grad(y, [x, bias, *weights], g, create_graph=True)
    outputs = dx, dweights[0] if dweights else None, dbias, g
    pairs = [(a, b) for a, b in zip(outputs, arriving, strict=True) if not (a is None or b is None)]
    found = torch.autograd.grad(
        [a for a, _ in pairs],
        [dy, x, *weights],
        [b for _, b in pairs],
        create_graph=True,
        allow_unused=True,
    )
    return *found, *(None,) * (_ARGUMENTS - len(found))


def transformed_first(
    dy: Tensor,
    x: Tensor,
    transform: Transform,
    closed: Tensor | None,
    call: Call,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and residual under a transform of `torch.func`.

    All rows of a batched dy take one all-reduce.

    Args:
        dy: gradient of the output, shape of x; may be batched.
        x: shape ``[N, C, *]``.
        transform: transform in the forward pass, without ReLU.
        closed: bool, true where the ReLU blocks the gradient, shape of x; None without ReLU.
        call: parameters of the forward pass.
        needs: gradient flags of x, weight, bias and residual.
    """
    weight, bias = transform.weight, transform.bias
    if torch.is_grad_enabled():
        # The saved statistics have no graph to x: the forward pass is differentiated anew.
        found = _first(dy, x, weight, bias, closed, call)
        return tuple(t if need else None for t, need in zip(found, needs, strict=False))
    g = dy if closed is None else dy.masked_fill(closed, 0)
    wanted = weight if needs[1] else None, bias if needs[2] else None
    sums, dweight, dbias = reference.backward_reduce(g, x, transform, wanted)
    # Also on ranks that need no dx: the all-reduce is collective.
    sums = differentiable_all_reduce(sums, call.group, call.about("backward", x))
    dx = reference.backward_elemt(g, x, transform, sums) if needs[0] else None
    return dx, dweight, dbias, g if needs[3] else None


def transformed_second(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    closed: Tensor | None,
    call: Call,
    arriving: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Return the result of :func:`second` under a transform of `torch.func`.

    Transforms forbid ``requires_grad_()``, which :func:`second` needs.

    Args:
        dy: gradient of the output.
        x: shape ``[N, C, *]``.
        weight: shape ``[C]``, or None.
        closed: bool, true where the ReLU blocks the gradient, shape of x; None without ReLU.
        call: parameters of the forward pass.
        arriving: gradients of dx, dweight, dbias and dresidual; may be batched.
    """
    present = [i for i, gradient in enumerate(arriving) if gradient is not None]
    bias = x.new_zeros(x.shape[1])

    def first(dy: Tensor, x: Tensor, affine: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
        outputs = _first(dy, x, affine.get("weight"), bias, closed, call)
        return tuple(outputs[i] for i in present)

    weights = {} if weight is None else {"weight": weight}
    pull: Any = torch.func.vjp(first, dy, x, weights)[1]
    ddy, dx, affine = pull(tuple(arriving[i] for i in present))
    return ddy, dx, affine.get("weight"), *(None,) * (_ARGUMENTS - 3)


def _first(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    closed: Tensor | None,
    call: Call,
) -> tuple[Tensor | None, ...]:
    """Return differentiable gradients of x, weight, bias and residual."""
    g = dy if closed is None else dy.masked_fill(closed, 0)
    plain = call._replace(relu=False, running=None, pending=None)
    affine = {k: t for k, t in (("weight", weight), ("bias", bias)) if t is not None}

    def output(x: Tensor, affine: dict[str, Tensor]) -> Tensor:
        return forward(x, affine.get("weight"), affine.get("bias"), None, plain)

    pull: Any = torch.func.vjp(output, x, affine)[1]
    dx, found = pull(g)
    return dx, found.get("weight"), found.get("bias"), g


def _apart(t: Tensor) -> Tensor:
    # Another tensor: dy may depend on x by way of the loss, which is not to be followed here.
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
