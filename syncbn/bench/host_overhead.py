"""What a forward pass costs before the first number is computed: Python, and calls of C."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

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
    waits = [0.0]
    all_reduce = dist.all_reduce

    def timed(*args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        all_reduce(*args, **kwargs)
        waits[-1] += time.perf_counter() - start

    def call_together() -> None:
        waits.append(0.0)
        together(x)

    calls: dict[str, Callable[[], object]] = {
        "theirs": lambda: theirs(x),
        "alone": lambda: alone(x),
        "together": call_together,
    }
    timed_calls = {name: finished(call, device) for name, call in calls.items()}
    with patch.object(dist, "all_reduce", timed):
        times = take_turns(timed_calls, _ROUNDS, _BURST, meet)
    walls = {name: taken.wall for name, taken in times.items()}
    # Of those that count.
    waited = torch.tensor(waits[-len(walls["together"]) :], dtype=torch.float64)
    return Overhead(
        **{name: Spread.of(slowest(wall)) for name, wall in walls.items()},
        all_reduce=Spread.of(slowest(waited)),
        beyond=Spread.of(slowest(walls["together"] - waited)),
    )
