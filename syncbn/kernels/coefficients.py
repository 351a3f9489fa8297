"""What batch norm does to a value, and the C numbers that elementwise loops need for it.

A mean rounded to float32 is off by up to 6e-8 |mean|: at mean/std = 1e4 that is 6e-4 standard
deviations, in every output. So the mean is split: ``mean = pivot + rest``, with ``pivot`` the
rounded mean, which kernels subtract from x (exactly, where x is near it), and ``rest`` folded in
float64 into the additive coefficients. The alternative ``x * scale + (bias - mean * scale)`` saves
one operation and has the same error as the rounded mean.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

#: Weight and bias; None for each whose gradient is not wanted.
Wanted: TypeAlias = "tuple[Tensor | None, Tensor | None]"


class Transform(NamedTuple):
    """``y = (x - mean) * invstd * weight + bias``, and ``max(y, 0)`` if there is a ReLU.

    Attributes:
        statistics: ``[mean (C) | invstd (C) | count (1)]`` of the whole group, float64,
            ``[2C + 1]``; invstd is 1/sqrt(var + eps), count the values per channel.
        weight: any floating dtype, shape ``[C]``, or None for ones.
        bias: any floating dtype, shape ``[C]``, or None for zeros.
        relu: whether a ReLU follows.
    """

    statistics: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    relu: bool = False

    @property
    def mean(self) -> Tensor:
        """The mean, float64, shape ``[C]``."""
        return self.statistics[: self.statistics.numel() // 2]

    @property
    def invstd(self) -> Tensor:
        """1/sqrt(var + eps), float64, shape ``[C]``."""
        return self.statistics[self.statistics.numel() // 2 : -1]

    @property
    def values(self) -> Tensor:
        """Values per channel in the whole group, float64 scalar; at least one."""
        return self.statistics[-1].clamp(min=1)


class Running(NamedTuple):
    """Running averages, which a batch moves in place.

    Attributes:
        mean: any floating dtype, shape ``[C]``, or None.
        var: any floating dtype, shape ``[C]``, or None; of unbiased variances.
        tracked: batches so far, int64 scalar, or None.
        momentum: weight of a batch; None for a cumulative average, which needs the counter.
    """

    mean: Tensor | None
    var: Tensor | None
    tracked: Tensor | None
    momentum: float | None


class Forward(NamedTuple):
    """What the forward pass makes of an input and the group's message.

    Attributes:
        eps: added to the variance.
        weight: any floating dtype, shape ``[C]``, or None for ones.
        bias: any floating dtype, shape ``[C]``, or None for zeros.
        relu: whether a ReLU comes last.
        running: averages to move, or None.
        gate: where to note what comes through the ReLU; None, but of a gated kernel.
    """

    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    relu: bool = False
    running: Running | None = None
    gate: Tensor | None = None


class Normalize(NamedTuple):
    """``y = (x - pivot) * scale + shift``; each of shape ``[C]`` and the compute dtype."""

    pivot: Tensor
    scale: Tensor
    shift: Tensor


class Backward(NamedTuple):
    """``dx = (dy - offset - (x - pivot) * slope) * scale``; each ``[C]`` and the compute dtype."""

    pivot: Tensor
    slope: Tensor
    offset: Tensor
    scale: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of elementwise arithmetic: float32 for half types, else the input's own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def split_mean(mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split a float64 mean into ``pivot`` (compute dtype) and ``rest`` (float64)."""
    pivot = mean.to(compute_dtype(dtype))
    return pivot, mean - pivot


def normalize_coefficients(
    mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Normalize:
    """Return the coefficients of the forward pass.

    Args:
        mean: float64, shape ``[C]``.
        invstd: 1/sqrt(var + eps), float64, shape ``[C]``.
        weight: any floating dtype, shape ``[C]``, or None for ones.
        bias: any floating dtype, shape ``[C]``, or None for zeros.
        dtype: the input's dtype.
    """
    pivot, rest = split_mean(mean, dtype)
    scale = invstd if weight is None else invstd * weight
    shift = -rest * scale if bias is None else bias - rest * scale
    return Normalize(pivot, scale.to(pivot.dtype), shift.to(pivot.dtype))


def backward_coefficients(transform: Transform, sums: Tensor, dtype: torch.dtype) -> Backward:
    """Return the coefficients of the input gradient.

    Args:
        transform: of the forward pass.
        sums: sum(dy) and sum(dy * xhat) over the whole group, float64, shape ``[2C]``.
        dtype: the input's dtype.
    """
    pivot, rest = split_mean(transform.mean, dtype)
    invstd, weight = transform.invstd, transform.weight
    mean_dy, mean_dy_xhat = (sums / transform.values).view(2, -1)
    slope = invstd * mean_dy_xhat
    offset = mean_dy - rest * slope
    scale = invstd if weight is None else invstd * weight
    compute = pivot.dtype
    return Backward(pivot, slope.to(compute), offset.to(compute), scale.to(compute))
