"""What a forward pass costs before the first number is computed: Python, and calls of C."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from syncbn.bench.mpirun import slowest
from syncbn.bench.timing import Spread, finished, take_turns
from syncbn.distributed.groups import resolve_group
from syncbn.module import SyncBatchNorm2d

# Tiny: to compute it takes about a microsecond.
SHAPE = (2, 16, 4, 4)
_MESSAGE = 2 * SHAPE[1] + 1
_BURST, _ROUNDS = 50, 20


@dataclass(frozen=True)
class Overhead:
    """Seconds of a forward pass in training of a tiny input, on the slowest rank.

    Attributes:
        theirs: nn.BatchNorm2d.
        alone: ours, in a group of one.
        together: ours, with all ranks.
        all_reduce: of the layer's message, by itself.
        beyond: together - all_reduce, call by call.
    """

    theirs: Spread
    alone: Spread
    together: Spread
    all_reduce: Spread
    beyond: Spread


def measure(device: torch.device, meet: Callable[[], None]) -> Overhead:
    """Time forward passes of a tiny input; every rank must call this."""
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    theirs = nn.BatchNorm2d(SHAPE[1], device=device)
    alone = SyncBatchNorm2d(SHAPE[1], process_group=resolve_group(1), device=device)
    together = SyncBatchNorm2d(SHAPE[1], device=device)
    message = torch.zeros(_MESSAGE, dtype=torch.float64, device=device)
    calls: dict[str, Callable[[], object]] = {
        "theirs": lambda: theirs(x),
        "alone": lambda: alone(x),
        "together": lambda: together(x),
        "all_reduce": lambda: dist.all_reduce(message) if dist.get_world_size() > 1 else None,
    }
    timed = {name: finished(call, device) for name, call in calls.items()}
    times = take_turns(timed, _ROUNDS, _BURST, meet)
    walls = {name: slowest(taken.wall) for name, taken in times.items()}
    return Overhead(
        **{name: Spread.of(wall) for name, wall in walls.items()},
        beyond=Spread.of(walls["together"] - walls["all_reduce"]),
    )
