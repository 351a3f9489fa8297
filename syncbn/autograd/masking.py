"""Values that do not count: padding."""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.kernels.reference import per_channel, reduced_dims
from syncbn.kernels.transform import compute_dtype


def fill(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return x with other values where it does not count, and what these add to the moments.

    They are the mean of those that count, so that the sums of both are as exact as without them:
    zeros would be far away from values of a large mean. Autograd gives them no gradient, and they
    need none. Shapes do not depend on the mask, so nothing is read back from a GPU.

    Args:
        x: shape ``[N, C, *]``.
        mask: bool, true where x counts; broadcasts against x and has one channel.

    Returns:
        x, and ``[sum (C) | sum_sq (C) | count (1)]`` of the filling, float64.
    """
    dims = reduced_dims(x)
    everything = x.numel() // x.shape[1]
    counting = mask.expand(x.shape[0], 1, *x.shape[2:]).sum(dtype=torch.float64)
    values = x.detach().to(compute_dtype(x.dtype)).masked_fill(~mask, 0)
    filling = (values.sum(dims) / counting.clamp(min=1)).to(x.dtype)
    filled = torch.where(mask, x, per_channel(filling, x))
    number, value = everything - counting, filling.double()
    return filled, torch.cat([number * value, number * value.square(), number.reshape(1)])
