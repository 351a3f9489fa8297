"""Running averages of the batch statistics: the only code that writes to a layer's buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.moments import Moments


def recorded(moments: Moments) -> Tensor:
    """Return whether the moments enter running averages: a boolean scalar tensor.

    Fewer than two values a channel have no variance. Such a batch is not recorded: when every rank
    is empty the averages stay as they are, and no NaN reaches them.
    """
    return moments.count > 1


def update_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    moments: Moments,
    momentum: float | Tensor,
) -> None:
    """Move running averages towards the moments of a batch, in place, without a host sync.

    ``running <- (1 - momentum) running + momentum batch``, with the unbiased variance, as torch.

    Args:
        running_mean: shape ``[C]``, any floating dtype, or None.
        running_var: shape ``[C]``, any floating dtype, or None.
        moments: of the whole synchronized batch.
        momentum: weight of this batch; a scalar tensor for a cumulative average.
    """
    counts = recorded(moments)
    with torch.no_grad():
        for running, batch in (
            (running_mean, moments.mean()),
            (running_var, moments.variance(unbiased=True)),
        ):
            if running is not None:
                # In float64, so that a half buffer rounds once.
                running.copy_(running + torch.where(counts, batch - running, 0.0) * momentum)


def write_running_statistics(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor
) -> None:
    """Replace running averages, in place.

    Args:
        running_mean: shape ``[C]``, any floating dtype.
        running_var: shape ``[C]``, any floating dtype.
        mean: shape ``[C]``.
        var: shape ``[C]``, unbiased.
    """
    with torch.no_grad():
        running_mean.copy_(mean)
        running_var.copy_(var)
