"""What a pass costs besides its arithmetic: Python, and calls of C."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.bench.mpirun import slowest
from syncbn.bench.timing import Spread, take_turns
from syncbn.bench.torchs import Synchronized
from syncbn.distributed.groups import resolve_group
from syncbn.nn.module import SyncBatchNorm2d

# Tiny: to compute it takes about a microsecond.
SHAPE = (2, 16, 4, 4)
_BURST = 50


@dataclass(frozen=True)
class Overhead:
    """Seconds that the host is at a pass in training of a tiny input, on the slowest rank.

    Attributes:
        backward: whether it is forward and backward, or forward alone.
        theirs: nn.BatchNorm2d.
        torchs: nn.SyncBatchNorm, which is for GPUs; None elsewhere.
        alone: ours, in a group of one.
        ratio: alone / theirs, pass by pass.
        together: ours, with all ranks.
        all_reduce: of that, the time in torch's all_reduce, with waiting for the other ranks.
        beyond: together - all_reduce, pass by pass.
    """

    backward: bool
    theirs: Spread
    torchs: Spread | None
    alone: Spread
    ratio: Spread
    together: Spread
    all_reduce: Spread
    beyond: Spread


def measure(
    device: torch.device, backward: bool, rounds: int, meet: Callable[[], None]
) -> Overhead:
    """Time passes of a tiny input; every rank must call this.

    Args:
        device: of the input.
        backward: forward and backward, or forward alone.
        rounds: of 50 passes of each.
        meet: ranks wait for each other here.
    """
    x, dy = torch.randn(2, *SHAPE, device=device).unbind()
    layers: dict[str, nn.Module] = {
        "theirs": nn.BatchNorm2d(SHAPE[1], device=device),
        "alone": SyncBatchNorm2d(SHAPE[1], process_group=resolve_group(1), device=device),
        "together": SyncBatchNorm2d(SHAPE[1], device=device),
    }
    if device.type == "cuda":
        layers["torchs"] = Synchronized(SHAPE[1], device=device)
    waits: list[float] = []
    all_reduce, clock = dist.all_reduce, time.perf_counter

    def timed(*arguments: Any, **how: Any) -> Any:
        start = clock()
        found = all_reduce(*arguments, **how)
        # torch's layer gives more than the vector by position.
        if len(arguments) == 1:
            waits.append(clock() - start)
        return found

    run = _step if backward else _forward
    x.requires_grad_()
    calls = {name: partial(run, layer, x, dy) for name, layer in layers.items()}

    def rest() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        meet()

    with patch.object(dist, "all_reduce", timed):
        times = take_turns(calls, rounds, _BURST, rest)
    walls = {name: taken.wall for name, taken in times.items()}
    passes, messages = len(walls["together"]), 2 if backward else 1
    # Of those that count; none if there is one rank.
    counted = waits[-passes * messages :] or passes * messages * [0.0]
    waited = torch.tensor(counted, dtype=torch.float64).view(passes, messages).sum(1)
    spreads = {name: Spread.of(slowest(wall)) for name, wall in walls.items()}
    return Overhead(
        backward,
        theirs=spreads["theirs"],
        torchs=spreads.get("torchs"),
        alone=spreads["alone"],
        together=spreads["together"],
        ratio=Spread.of(slowest(walls["alone"] / walls["theirs"])),
        all_reduce=Spread.of(slowest(waited)),
        beyond=Spread.of(slowest(walls["together"] - waited)),
    )


def _forward(layer: nn.Module, x: Tensor, dy: Tensor) -> object:
    return layer(x)


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> object:
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
