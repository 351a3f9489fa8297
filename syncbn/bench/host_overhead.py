"""What a forward pass costs before the first number is computed: Python, and calls of C."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.bench.mpirun import slowest
from syncbn.bench.timing import Spread, finished, take_turns
from syncbn.distributed.groups import resolve_group
from syncbn.module import SyncBatchNorm2d

# Tiny: to compute it takes about a microsecond.
SHAPE = (2, 16, 4, 4)
_BURST, _ROUNDS = 50, 20


@dataclass(frozen=True)
class Overhead:
    """Seconds of a forward pass in training of a tiny input, on the slowest rank.

    Attributes:
        theirs: nn.BatchNorm2d.
        alone: ours, in a group of one.
        together: ours, with all ranks.
        all_reduce: of that, the time in torch's all_reduce, with waiting for the other ranks.
        beyond: together - all_reduce, pass by pass.
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
    waits: list[float] = []
    all_reduce, clock = dist.all_reduce, time.perf_counter

    def timed(vector: Tensor, group: dist.ProcessGroup) -> None:
        start = clock()
        all_reduce(vector, group=group)
        waits.append(clock() - start)

    calls = {
        "theirs": partial(theirs, x),
        "alone": partial(alone, x),
        "together": partial(together, x),
    }
    timed_calls = {name: finished(call, device) for name, call in calls.items()}
    with patch.object(dist, "all_reduce", timed):
        times = take_turns(timed_calls, _ROUNDS, _BURST, meet)
    walls = {name: taken.wall for name, taken in times.items()}
    passes = len(walls["together"])
    # Of those that count; none if there is one rank.
    waited = torch.tensor(waits[-passes:] or passes * [0.0], dtype=torch.float64)
    return Overhead(
        **{name: Spread.of(slowest(wall)) for name, wall in walls.items()},
        all_reduce=Spread.of(slowest(waited)),
        beyond=Spread.of(slowest(walls["together"] - waited)),
    )
