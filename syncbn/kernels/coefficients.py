"""Per-channel coefficients of the elementwise loops, from float64 statistics.

A mean rounded to float32 is off by up to 6e-8 |mean|: at mean/std = 1e4 that is 6e-4 standard
deviations in every output. So the mean is split, ``mean = pivot + rest``: kernels subtract the
rounded ``pivot`` from x (exactly, where x is near it), and ``rest`` is folded in float64 into the
additive coefficients. The alternative ``x * scale + (bias - mean * scale)`` saves one operation
and has the same error as the rounded mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ForwardCoefficients(NamedTuple):
    """``y = (x - pivot) * scale + shift``; each of shape ``[C]`` and the compute dtype."""

    pivot: Tensor
    scale: Tensor
    shift: Tensor


class BackwardCoefficients(NamedTuple):
    """``dx = (dy - offset - (x - pivot) * slope) * scale``; each ``[C]``, compute dtype."""

    pivot: Tensor
    slope: Tensor
    offset: Tensor
    scale: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of elementwise arithmetic: float32 for half types, or the input's dtype."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def split_statistics(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, invstd and count, clamped to at least one.

    Args:
        statistics: ``[mean (C) | invstd (C) | count (1)]``, float64.
    """
    channels = statistics.numel() // 2
    mean, invstd = statistics[:channels], statistics[channels : 2 * channels]
    return mean, invstd, statistics[-1].clamp(min=1)


def split_mean(mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``pivot`` in the compute dtype and ``rest`` in float64.

    Args:
        mean: mean per channel, float64, shape ``[C]``.
        dtype: dtype of the input.
    """
    pivot = mean.to(compute_dtype(dtype))
    return pivot, mean - pivot


def forward_coefficients(
    mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> ForwardCoefficients:
    """Return the coefficients of the forward pass.

    Args:
        mean: mean per channel, float64, shape ``[C]``.
        invstd: 1/sqrt(var + eps), float64, shape ``[C]``.
        weight: scale per channel, any floating dtype, shape ``[C]``, or None for ones.
        bias: shift per channel, any floating dtype, shape ``[C]``, or None for zeros.
        dtype: dtype of the input.
    """
    pivot, rest = split_mean(mean, dtype)
    scale = invstd if weight is None else invstd * weight
    shift = -rest * scale if bias is None else bias - rest * scale
    return ForwardCoefficients(pivot, scale.to(pivot.dtype), shift.to(pivot.dtype))


def backward_coefficients(
    statistics: Tensor, weight: Tensor | None, sums: Tensor, dtype: torch.dtype
) -> BackwardCoefficients:
    """Return the coefficients of the input gradient.

    Args:
        statistics: ``[mean | invstd | count]`` of the whole group, float64, shape ``[2C + 1]``.
        weight: scale per channel, any floating dtype, shape ``[C]``, or None for ones.
        sums: ``[sum(dy) | sum(dy * xhat)]`` of the whole group, float64, shape ``[2C]``.
        dtype: dtype of the input.
    """
    mean, invstd, count = split_statistics(statistics)
    pivot, rest = split_mean(mean, dtype)
    mean_dy, mean_dy_xhat = (sums / count).view(2, -1)
    slope = invstd * mean_dy_xhat
    offset = mean_dy - rest * slope
    scale = invstd if weight is None else invstd * weight
    compute = pivot.dtype
    return BackwardCoefficients(pivot, slope.to(compute), offset.to(compute), scale.to(compute))


def affine(x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``(x - mean) * invstd * weight + bias`` in the compute dtype, shape of x.

    Args:
        x: input, shape ``[N, C, *]``.
        statistics: ``[mean | invstd | count]`` of the whole group, float64, shape ``[2C + 1]``.
        weight: scale per channel, shape ``[C]``, or None for ones.
        bias: shift per channel, shape ``[C]``, or None for zeros.
    """
    mean, invstd, _ = split_statistics(statistics)
    coefficients = forward_coefficients(mean, invstd, weight, bias, x.dtype)
    # Packed: a compiler would otherwise put per-channel roots and quotients into the loop over x.
    pivot, scale, shift = (per_channel(v, x) for v in torch.stack(coefficients).unbind())
    return (x - pivot) * scale + shift


def reduced_dims(x: Tensor) -> list[int]:
    """Return the dimensions of ``[N, C, *]`` that a per-channel reduction runs over."""
    return [0, *range(2, x.ndim)]


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View per-channel values ``[C]`` so that they broadcast against x, ``[N, C, *]``."""
    return v.view(-1, *(1,) * (x.ndim - 2))
