"""Batch norm in a group of one by a node in C++, where there are launches that it can repeat.

An autograd function in Python takes the host 25 microseconds before it has launched anything. The
node repeats what Python has launched for tensors that lie alike, on the same stream; all else is
left to Python: the first pass of each kind, gradients of gradients, what hooks have changed.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from syncbn.autograd import node_build
from syncbn.autograd.call import Call
from syncbn.autograd.function import Saved, SyncBatchNormFunction, gradients
from syncbn.kernels import Forward, Transform
from syncbn.kernels.kept import is_kept
from syncbn.kernels.samples import view_of
from syncbn.ownership import SMALL_ON_GPU

# Kinds of inputs: more than a network has, whose images may have all sizes.
_MOST = 4096
if TYPE_CHECKING:
    from syncbn.kernels.triton_driver import Calls
    from syncbn.kernels.triton_launch import Current

#: Launches, as `node.cpp` knows them.
Launches: TypeAlias = Any


class Plans(Protocol):
    """What `node.cpp` has been told to launch, for each kind of input."""

    def normalize(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
    ) -> Tensor | bool | None:
        """Return what batch norm makes of x; False if it has not been told; None if it cannot."""

    def add(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
        launches: Launches,
        gate_bytes: int,
        view: tuple[int, int, int] | None,
    ) -> None:
        """Launch this for inputs that lie like these.

        Args:
            x: shape ``[N, C, *]``.
            weight: shape ``[C]``, or None.
            bias: shape ``[C]``, or None.
            residual: shape and dtype of x, or None.
            call: the rest.
            launches: of the forward pass.
            gate_bytes: of the gate; less than zero if there is none.
            view: of a gate.
        """


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> Tensor:
    """Return what :class:`SyncBatchNormFunction` returns."""
    kernel, found = call.kernel, None
    if is_kept(kernel) and call.is_alone and (plans := _plans(kernel.current())) is not None:
        found = plans.normalize(x, weight, bias, residual, call)
        if isinstance(found, Tensor):
            return found
    if residual is x:  # torch.compile refuses a tensor that is given twice
        residual = x.view_as(x)
    y: Tensor = SyncBatchNormFunction.apply(x, weight, bias, residual, call)
    if found is False:
        _add(x, weight, bias, residual, call)
    return y


def _add(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> None:
    """Tell the node what has been launched for these, if it has been kept."""
    kernel = call.kernel
    assert is_kept(kernel)
    gate = kernel.new_gate(x) if call.relu and residual is not None else None
    how = Forward(call.eps, weight, bias, call.relu, call.running, gate)
    launches = _launches(kernel.kept_forward(x, how, residual))
    plans = _plans(kernel.current())
    if launches is not None and plans is not None:
        size, view = (-1, None) if gate is None else (gate.numel(), view_of(x))
        plans.add(x, weight, bias, residual, call, launches, size, view)


def _backward(
    dy: Tensor,
    saved: Saved,
    needs: tuple[bool, bool, bool, bool],
    call: Call,
    view: tuple[int, int, int] | None,
) -> tuple[tuple[Tensor | None, ...], Launches | None]:
    """Return gradients, as the node asks for them, and what has been launched, if it was kept."""
    found = gradients(dy, saved, call, view, needs)
    needs_x, needs_weight, needs_bias, _ = needs
    if torch.is_grad_enabled() or not needs_x:
        return found, None
    kernel, (x, weight, bias, statistics, gate) = call.kernel, saved
    assert is_kept(kernel)
    transform = Transform(statistics, weight, bias, call.relu and gate is None)
    wanted = weight if needs_weight else None, bias if needs_bias else None
    return found, _launches(kernel.kept_backward(gate, x, transform, wanted))


def _launches(calls: Calls | None) -> Launches | None:
    return None if calls is None else node_build.library().Launches(*calls.parts, calls)


@cache
def _plans(current: Current | None) -> Plans | None:
    """Return what the node has been told; None if there is no node, or nothing to tell it."""
    if current is None or isinstance(library := node_build.library(), str):
        return None
    plans: Plans = library.Plans(*current, _backward, SMALL_ON_GPU, _MOST)
    return plans
