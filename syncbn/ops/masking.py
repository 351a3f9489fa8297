"""Values that do not count: padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.kernels.coefficients import compute_dtype
from syncbn.kernels.reference import per_channel, reduced_dims
from syncbn.moments import Moments, has_two_parts


class Filling(NamedTuple):
    """What stands where values do not count.

    Attributes:
        value: shape ``[C]``, of the input's dtype.
        counting: how many values of a channel count, float64 scalar.
    """

    value: Tensor
    counting: Tensor


def fill(x: Tensor, mask: Tensor) -> tuple[Tensor, Filling]:
    """Return x with other values where it does not count.

    They are the mean of those that count. Autograd gives them no gradient, and they need none.
    Shapes do not depend on the mask, so nothing is read back from a GPU.

    Args:
        x: shape ``[N, C, *]``.
        mask: bool, true where x counts; broadcasts against x and has one channel.

    """
    dims = reduced_dims(x)
    counting = mask.expand(x.shape[0], 1, *x.shape[2:]).sum(dtype=torch.float64)
    values = x.detach().to(compute_dtype(x.dtype)).masked_fill(~mask, 0)
    filling = (values.sum(dims) / counting.clamp(min=1)).to(x.dtype)
    return torch.where(mask, x, per_channel(filling, x)), Filling(filling, counting)


def moments(of: Callable[[Tensor], Tensor], x: Tensor, filling: Filling) -> Tensor:
    """Return the packed moments of the values that count.

    They are taken around the filling, which then adds zeros: were it taken off the sums afterwards,
    what few values have between them would be lost in the sums of many.

    Args:
        of: :meth:`syncbn.kernels.Kernel.moments`.
        x: from :func:`fill`.
        filling: from there.
    """
    differences = x.to(compute_dtype(x.dtype)) - per_channel(filling.value, x)
    first, second = Moments.unpack(of(differences), x.shape[1]).round_sums()
    pivot, two_parts = filling.value.double(), has_two_parts(x.dtype)
    return Moments.from_pivot(filling.counting, pivot, first, second, two_parts).pack()
