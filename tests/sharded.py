"""A function of the whole batch, computed by all ranks, for gradient checkers.

Every rank holds the whole batch and computes its own samples. Forward and backward are transposes
of each other, so derivatives of any order equal one process's.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class Own(Function):
    """Whole batch -> own samples. Its transpose is :class:`Whole`."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        own: Tensor = whole.split(sizes)[dist.get_rank()]
        return own.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Whole.apply(grad, ctx.sizes), None


class Whole(Function):
    """Own samples -> whole batch, on every rank."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        whole = own.new_zeros(sum(sizes), *own.shape[1:])
        whole.split(sizes)[dist.get_rank()].copy_(own)
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Own.apply(grad, ctx.sizes), None


class Everywhere(Function):
    """A parameter, the same on all ranks. Its gradient is the sum of theirs: :class:`Total`."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = Total.apply(grad)
        return total


class Total(Function):
    """Sum over ranks, on every rank."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parts: Tensor = Everywhere.apply(grad)
        return parts
