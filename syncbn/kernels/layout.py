"""The memory layout of a tensor, as the kernels in C++ and Triton address it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class NCSLayout(NamedTuple):
    """A tensor as samples of ``[channels, spatial size]``, with gaps only between samples.

    A contiguous ``[N, C, *]`` has N samples; a channels_last one has N times ``*`` samples of
    spatial size 1. Slices along channels or batches have gaps.

    Attributes:
        batch: number of samples.
        channels: C.
        space: values of a channel in a sample.
        stride: elements from a sample to the next.
        dense_stride: stride of a tensor without gaps.
    """

    batch: int
    channels: int
    space: int
    stride: int
    dense_stride: int

    @staticmethod
    def contiguous(shape: Sequence[int]) -> NCSLayout:
        """Return the layout of a contiguous tensor of shape ``[N, C, *]``."""
        batch, channels, *rest = shape
        space = math.prod(rest)
        return NCSLayout(batch, channels, space, channels * space, channels * space)

    @property
    def key(self) -> tuple[int, int, int]:
        """Batch, channels and space: the order of the values, whatever the gaps."""
        return self[:3]


def as_dense(x: Tensor) -> tuple[Tensor, NCSLayout]:
    """Return x, or a contiguous copy if its strides have no layout, and the layout."""
    x = x.resolve_neg() if x.is_neg() else x
    layout = _find_layout(x.shape, x.stride())
    if layout is None:
        x = x.contiguous()
        layout = NCSLayout.contiguous(x.shape)
    return x, layout


def with_key(x: Tensor, key: tuple[int, int, int] | None) -> tuple[Tensor, NCSLayout]:
    """Return x, or a copy of it, with a layout of this key (None for any), and the layout.

    Hooks of saved tensors (offloading, compression) may return x with other strides.
    """
    x, layout = as_dense(x)
    if key is None or layout.key == key:
        return x, layout
    batch, channels, space = key
    stride = channels * space
    # Not from the strides of the copy: a single channel's strides fit two keys.
    layout = NCSLayout(batch, channels, space, stride, stride)
    return _new_empty(x, layout, x.dtype).copy_(x), layout


def match_layout(t: Tensor, x: Tensor, layout: NCSLayout) -> tuple[Tensor, int]:
    """Return t, or a copy, with the layout of x up to gaps; and its stride between samples."""
    t = t.resolve_neg() if t.is_neg() else t
    if t._is_zerotensor():
        t = torch.zeros_like(x)
    actual = _find_layout(t.shape, t.stride())
    if actual == layout:
        return t, layout.stride
    if actual is None or actual.key != layout.key:
        return empty_dense(x, layout).copy_(t), layout.dense_stride
    return t, actual.stride


def empty_dense(x: Tensor, layout: NCSLayout) -> Tensor:
    """Return an uninitialized tensor of x's dtype and layout, without gaps."""
    if layout.stride == layout.dense_stride:
        return torch.empty_like(x)
    return _new_empty(x, layout, x.dtype)


def _new_empty(x: Tensor, layout: NCSLayout, dtype: torch.dtype) -> Tensor:
    shape = x.shape
    if layout.batch == shape[0]:
        return x.new_empty(shape, dtype=dtype)
    return x.new_empty(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)


# Layers see the same few shapes again and again.
@lru_cache(maxsize=1024)
def _find_layout(shape: torch.Size, strides: tuple[int, ...]) -> NCSLayout | None:
    dense = NCSLayout.contiguous(shape)
    spatial = range(len(shape) - 1, 1, -1)
    if _is_nested((*spatial, 1, 0), shape, strides, 1):
        return dense
    if _is_nested((*spatial, 1), shape, strides, 1):
        return dense._replace(stride=strides[0])
    if _is_nested((1,), shape, strides, 1):
        positions = (*spatial, 0)
        stride = next(strides[d] for d in positions if shape[d] > 1)
        if _is_nested(positions, shape, strides, stride):
            channels = dense.channels
            return NCSLayout(dense.batch * dense.space, channels, 1, stride, channels)
    return None


def _is_nested(
    dims: Iterable[int], shape: Sequence[int], strides: Sequence[int], stride: int
) -> bool:
    """Return whether dimensions, from the innermost, are one dimension with this stride."""
    for dim in dims:
        if shape[dim] > 1:
            if strides[dim] != stride:
                return False
            stride *= shape[dim]
    return True
