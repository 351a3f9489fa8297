"""Whether a gradient is nobody else's, so that the one computed from it may take its memory."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.modes import num_dispatch_modes

# Not in every version of torch.
_COUNT = "_use_count"
# Bytes. What is smaller lies in the cache, as new memory does: nothing is gained by asking. On a
# GPU it is memory that is gained, no time, and asking takes the host longer than a small layer.
_SMALL, _SMALL_ON_GPU = 1 << 16, 1 << 26


class Owners(NamedTuple):
    """How often a gradient is referred to.

    Attributes:
        object: by Python: a hook may have kept it, or the user may have passed it.
        tensor: by C++: the engine may have handed it to two functions.
        storage: its memory, by tensors.
        storage_object: its memory, by Python.
    """

    object: int
    tensor: int
    storage: int
    storage_object: int

    @staticmethod
    def of(gradient: Tensor, references: int) -> Owners:
        """Count.

        Args:
            gradient: an argument of a backward function.
            references: `sys.getrefcount` of it, called by that function.
        """
        storage = gradient.untyped_storage()
        uses = torch._C._storage_Use_Count(storage._cdata)
        tensors: int = getattr(gradient, _COUNT)()
        return Owners(references, tensors, uses, sys.getrefcount(storage))


def is_unshared(gradient: Tensor, references: int) -> bool:
    """Return whether nobody but a running backward function will look at a gradient again.

    The engine itself asks this before it adds gradients in place. What is counted for a gradient
    that is nobody else's depends on the interpreter and on torch, and is found out with one. Of
    small gradients this says no: their memory is not worth the question.

    Args:
        gradient: the argument ``dy`` of a ``backward(ctx, dy)``.
        references: `sys.getrefcount` of it, called there.
    """
    least = _SMALL if gradient.is_cpu else _SMALL_ON_GPU
    if gradient.nbytes < least or not hasattr(gradient, _COUNT):
        return False
    if gradient.requires_grad or _is_seen():
        return False
    if not _is_of_torch(gradient):
        return False
    counts = zip(Owners.of(gradient, references), _of_nobody_else(), strict=True)
    return all(count <= alone for count, alone in counts)


def _is_of_torch(gradient: Tensor) -> bool:
    # Memory of NumPy and of other processes cannot be resized, or is shared; as all of a GPU's is,
    # if torch is asked.
    storage = gradient.untyped_storage()
    return storage.resizable() and not (gradient.is_cpu and storage.is_shared())


def _is_seen() -> bool:
    # Modes, debuggers and profilers have references of their own, and may keep them.
    return num_dispatch_modes() > 0 or sys.gettrace() is not None or sys.getprofile() is not None


@cache
def _of_nobody_else() -> Owners:
    found: list[Owners] = []
    x = torch.zeros(2, device="cpu", requires_grad=True)
    with torch.enable_grad():
        y = _Probe.apply(x, found)
        torch.autograd.grad(y * 2, x, torch.ones_like(x))
    return found[0]


class _Probe(torch.autograd.Function):
    """Gets a gradient that nobody else has, as the backward function that asks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[Owners]) -> Tensor:
        ctx.found = found
        return x * 1

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        # By itself: among the arguments of another call, dy would be referred to once more.
        references = sys.getrefcount(dy)
        ctx.found.append(Owners.of(dy, references))
        return dy, None
