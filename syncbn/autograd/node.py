"""The autograd function again, in C++, for kernels whose launches it can make.

In Python a function takes the host 25 microseconds before it has launched anything. That of
`node.cpp` allocates and launches; what it needs to know, it asks :class:`Steps` for once for each
kind of input, and messages are still sent there. What it is not made for is left to Python.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from syncbn.autograd import function, node_build
from syncbn.autograd.backward import BESIDE
from syncbn.autograd.call import Call
from syncbn.autograd.function import Saved, SyncBatchNormFunction
from syncbn.distributed import collectives
from syncbn.distributed.collectives import Message
from syncbn.kernels import Forward, Transform
from syncbn.kernels.launched import is_launched
from syncbn.kernels.samples import view_of
from syncbn.ownership import SMALL_ON_GPU

if TYPE_CHECKING:
    from syncbn.kernels.triton_launch import Current, Launch

# Kinds of inputs: more than a network has, whose images may have all sizes.
_MOST = 4096


class Plans(Protocol):
    """How inputs are normalized, for each kind of them: `node.cpp`."""

    def normalize(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
    ) -> Tensor | None:
        """Return what batch norm makes of x; None for tensors that this is not for.

        It is for plain tensors without gaps, of more than a value a channel, and a residual that
        lies as they do; not for cumulative averages.
        """


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> Tensor:
    """Return what :class:`SyncBatchNormFunction` returns."""
    kernel = call.kernel
    if is_launched(kernel) and call.is_usual and (plans := _plans(kernel.current())) is not None:
        found = plans.normalize(x, weight, bias, residual, call)
        if found is not None:
            return found
    if residual is x:  # torch.compile refuses a tensor that is given twice
        residual = x.view_as(x)
    y: Tensor = SyncBatchNormFunction.apply(x, weight, bias, residual, call)
    return y


class Steps:
    """What `node.cpp` asks Python for. Tensors and calls are those of :func:`normalize`."""

    @staticmethod
    def plan(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
    ) -> tuple[tuple[Launch, ...], int, tuple[int, int, int] | None]:
        """Return the launches of a forward pass; the gate's bytes, or -1, and view, or None."""
        kernel = call.kernel
        assert is_launched(kernel)
        gate = kernel.new_gate(x) if call.relu and residual is not None else None
        how = Forward(call.eps, weight, bias, call.relu, call.running, gate)
        launches = kernel.forward_launches(x, how, residual, call.group is None)
        return launches, *((-1, None) if gate is None else (gate.numel(), view_of(x)))

    @staticmethod
    def backward(saved: Saved, call: Call, needs: tuple[bool, ...]) -> tuple[Launch, ...]:
        """Return the launches of a backward pass that x needs."""
        kernel, (x, weight, bias, statistics, gate) = call.kernel, saved
        assert is_launched(kernel)
        transform = Transform(statistics, weight, bias, call.relu and gate is None)
        wanted = weight if needs[1] else None, bias if needs[2] else None
        given = gate, x, transform, wanted
        return kernel.backward_launches(*given, call.group is None, x.nbytes <= BESIDE)

    @staticmethod
    def gradients(
        saved: Saved,
        call: Call,
        needs: tuple[bool, ...],
        dy: Tensor,
        view: tuple[int, int, int] | None,
    ) -> tuple[Tensor | None, ...]:
        """Do a backward pass that the node is not made for."""
        return function.gradients(dy, saved, call, view, needs)

    @staticmethod
    def exchange(message: Tensor, x: Tensor, call: Call, direction: str) -> Tensor:
        """Return a message summed over the group."""
        return collectives.all_reduce(message, call.group, call.about(direction, x))

    @staticmethod
    def begin(message: Tensor, x: Tensor, call: Call) -> Message:
        """Begin to sum a backward message over the group."""
        return collectives.begin_all_reduce(message, call.group, call.about("backward", x))


@cache
def _plans(current: Current | None) -> Plans | None:
    """Return the plans for where launches are made; None if there is no node."""
    if isinstance(library := node_build.library(), str):
        return None
    where: tuple[Any, ...] = (None, None, None) if current is None else current
    plans: Plans = library.Plans(Steps, *where, SMALL_ON_GPU, _MOST)
    return plans
