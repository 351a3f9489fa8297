"""Masked inputs: padding that does not count.

Masked positions are filled with the mean of the unmasked ones, and moments are taken around that
fill value. So every kernel and every derivative supports masks, and no shape depends on the mask:
nothing is read back from a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.kernels.coefficients import compute_dtype, per_channel, reduced_dims
from syncbn.moments import Moments, has_two_parts


class MaskFill(NamedTuple):
    """Fill of the masked positions.

    Attributes:
        value: fill value per channel, dtype of the input, shape ``[C]``.
        num_unmasked: unmasked values per channel, float64 scalar.
    """

    value: Tensor
    num_unmasked: Tensor


def fill_masked(x: Tensor, mask: Tensor) -> tuple[Tensor, MaskFill]:
    """Return x with masked positions filled, and the fill.

    Autograd passes no gradient to the fill, and none is needed.

    Args:
        x: input, shape ``[N, C, *]``.
        mask: bool, True where x counts, one channel, broadcasts against x.
    """
    dims = reduced_dims(x)
    count = mask.expand(x.shape[0], 1, *x.shape[2:]).sum(dtype=torch.float64)
    values = x.detach().to(compute_dtype(x.dtype)).masked_fill(~mask, 0)
    fill = (values.sum(dims) / count.clamp(min=1)).to(x.dtype)
    return torch.where(mask, x, per_channel(fill, x)), MaskFill(fill, count)


def masked_moments(
    compute_moments: Callable[[Tensor], Tensor], x: Tensor, fill: MaskFill
) -> Tensor:
    """Return the packed moments of the unmasked values.

    Sums are centered on the fill value, so that masked positions add exact zeros. Subtracting their
    share afterwards would cancel.

    Args:
        compute_moments: ``moments`` of a kernel.
        x: first result of :func:`fill_masked`.
        fill: second result of :func:`fill_masked`.
    """
    centered = x.to(compute_dtype(x.dtype)) - per_channel(fill.value, x)
    first, second = Moments.unpack(compute_moments(centered), x.shape[1]).round_sums()
    pivot, two_parts = fill.value.double(), has_two_parts(x.dtype)
    return Moments.from_pivot(fill.num_unmasked, pivot, first, second, two_parts).pack()
