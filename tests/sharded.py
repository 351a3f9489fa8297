"""A function of the whole batch, computed by all ranks, for gradient checkers.

Every rank holds the whole batch and computes its own samples. Forward and backward are transposes
of each other, so derivatives of any order equal one process's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class _Replicate(Function):
    """Identity; the gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = _AllReduce.apply(grad)
        return total


class _AllReduce(Function):
    """Sum over ranks, on every rank; the transpose of :class:`_Replicate`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return replicate(grad)


def replicate(x: Tensor) -> Tensor:
    """Return a tensor that is the same on all ranks; its gradient is the sum over ranks."""
    y: Tensor = _Replicate.apply(x)
    return y


def scatter(whole: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return this rank's samples of a replicated batch."""
    own: Tensor = replicate(whole).split(sizes)[dist.get_rank()]
    return own


def gather(own: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return the whole batch, on every rank."""
    parts = [own.new_zeros(size, *own.shape[1:]) for size in sizes]
    parts[dist.get_rank()] = own
    whole: Tensor = _AllReduce.apply(torch.cat(parts))
    return whole
