"""Times of all-reduces, and the synchronization time of a network's step that follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn

from syncbn.bench.ranks import max_over_ranks
from syncbn.bench.timing import interleave, synchronized

#: Numbers of float64 values, from a scalar to a layer of 8192 channels.
SIZES = (1, 130, 1026, 4098, 16386)
_REPEATS = 30


def time_all_reduces(
    device: torch.device, group: dist.ProcessGroup | None = None, sizes: Sequence[int] = SIZES
) -> dict[int, float]:
    """Return the median seconds of an all-reduce on the slowest rank, by number of float64 values.

    A collective of all ranks.

    Args:
        device: device of the values.
        group: group of this rank; None for all ranks.
        sizes: numbers of values.
    """
    seconds = {}
    for size in sizes:
        vector = torch.zeros(size, dtype=torch.float64, device=device)
        call = synchronized(partial(dist.all_reduce, vector, group=group), device)
        times = interleave({"all_reduce": call}, _REPEATS)["all_reduce"]
        seconds[size] = float(max_over_ranks(times).median())
    return seconds


def list_messages(network: nn.Module) -> list[int]:
    """Return the number of float64 values in each all-reduce of a training step.

    Every batch norm with C channels sends 2C + 2 values forward and 2C + 2 backward, for inputs
    other than float64.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [2 * norm.num_features + 2 for norm in norms for _ in ("forward", "backward")]


def predict_seconds(messages: Sequence[int], seconds: Mapping[int, float]) -> float:
    """Return the time of all-reduces in sequence, interpolated between measured sizes.

    Args:
        messages: numbers of float64 values.
        seconds: measured time by number of values, for two sizes at least.
    """
    points = sorted(seconds.items())

    def interpolate(size: int) -> float:
        below = [(low, high) for low, high in pairwise(points) if low[0] <= size]
        (x, t), (x2, t2) = below[-1] if below else points[:2]
        return t + (t2 - t) * (size - x) / (x2 - x)

    return sum(map(interpolate, messages))
