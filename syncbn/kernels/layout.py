"""How kernels see a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Samples(NamedTuple):
    """Samples ``[channels, space]`` that are dense, a stride apart.

    A contiguous ``[N, C, *]`` is N of them; a channels_last one is N times ``*`` of space 1. There
    may be gaps between them, as slices of channels and batches have.

    Attributes:
        batch: how many.
        channels: C.
        space: values of a channel of a sample.
        stride: elements from a sample to the next.
        dense_stride: the stride if there are no gaps.
    """

    batch: int
    channels: int
    space: int
    stride: int
    dense_stride: int

    @staticmethod
    def dense(shape: Sequence[int]) -> Samples:
        """Return what a contiguous tensor is, shape ``[N, C, *]``."""
        batch, channels, *rest = shape
        space = math.prod(rest)
        return Samples(batch, channels, space, channels * space, channels * space)

    @staticmethod
    def of(x: Tensor) -> Samples | None:
        """Return what x is, shape ``[N, C, *]``; None if it cannot be seen so."""
        return _samples(x.shape, x.stride())

    def empty_like(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor that is seen as x is, but without gaps."""
        shape = x.shape
        if self.batch == shape[0]:
            return x.new_empty(shape, dtype=dtype)
        return x.new_empty(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)


def readable(x: Tensor) -> tuple[Tensor, Samples]:
    """Return x, or a copy if it has to be, and what kernels see in it."""
    x = x.resolve_neg() if x.is_neg() else x
    samples = _samples(x.shape, x.stride())
    if samples is None:
        x = x.contiguous()
        samples = Samples.dense(x.shape)
    return x, samples


def view_of(x: Tensor) -> tuple[int, int, int]:
    """Return how many samples, channels and values of a channel kernels see in x."""
    return (Samples.of(x) or Samples.dense(x.shape))[:3]


def seen_as(x: Tensor, view: tuple[int, int, int]) -> Tensor:
    """Return x, or a copy if it has to be, of which kernels have this view."""
    if view_of(x) == view:
        return x
    return Samples(*view, 0, 0).empty_like(x, x.dtype).copy_(x)


def alike(t: Tensor, x: Tensor, samples: Samples) -> tuple[Tensor, int]:
    """Return t, or a copy if it has to be, seen as x is, and its stride."""
    t = t.resolve_neg() if t.is_neg() else t
    if t._is_zerotensor():
        t = torch.zeros_like(x)
    found = _samples(t.shape, t.stride())
    if found == samples:
        return t, samples.stride
    if found is None or found[:3] != samples[:3]:
        return empty_like(x, samples).copy_(t), samples.dense_stride
    return t, found.stride


def empty_like(x: Tensor, samples: Samples, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialized tensor of x's layout, without gaps; of its dtype, or another."""
    if samples.stride == samples.dense_stride:
        return torch.empty_like(x, dtype=dtype)
    return samples.empty_like(x, dtype or x.dtype)


# Layers see the same few shapes again and again.
@lru_cache(maxsize=1024)
def _samples(shape: torch.Size, strides: tuple[int, ...]) -> Samples | None:
    dense = Samples.dense(shape)
    spatial = range(len(shape) - 1, 1, -1)
    if _follow((*spatial, 1, 0), shape, strides, 1):
        return dense
    if _follow((*spatial, 1), shape, strides, 1):
        return dense._replace(stride=strides[0])
    if _follow((1,), shape, strides, 1):
        positions = (*spatial, 0)
        stride = next(strides[d] for d in positions if shape[d] > 1)
        if _follow(positions, shape, strides, stride):
            channels = dense.channels
            return Samples(dense.batch * dense.space, channels, 1, stride, channels)
    return None


def _follow(dims: Iterable[int], shape: Sequence[int], strides: Sequence[int], step: int) -> bool:
    """Return whether dimensions, from the innermost, lie as one whose stride is ``step``."""
    for dim in dims:
        if shape[dim] > 1:
            if strides[dim] != step:
                return False
            step *= shape[dim]
    return True
