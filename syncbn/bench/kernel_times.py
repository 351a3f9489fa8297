"""Bandwidth of the steps of a kernel, as a share of the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from syncbn import kernels
from syncbn.bench.layer_cases import Case
from syncbn.bench.ranks import World
from syncbn.bench.timing import Clock, Percentiles, interleave
from syncbn.kernels.base import NormalizeArgs

#: Reads and writes of the whole tensor by each step. A copy: 2.
TRAFFIC = {"moments": 1, "normalize": 2, "backward_reduce": 2, "backward_elemt": 3}
_COPY, _COPY_TRAFFIC = "copy", 2
_EPS = 1e-5


@dataclass(frozen=True)
class KernelCost:
    """Cost of the steps of a kernel on one input, on this rank."""

    case: Case
    kernel: str
    seconds: dict[str, Percentiles]  # by step; "copy": to memory that is allocated
    share: dict[str, Percentiles]  # bandwidth over the bandwidth of the copy, by round; by step


def time_kernel(case: Case, name: str, rounds: int, world: World, clock: Clock) -> KernelCost:
    """Time the steps of a kernel on one input; all ranks at a time, without communication."""
    x, dy = case.tensor(world.device), case.tensor(world.device)
    kernel = kernels.select_kernel(name, x)
    ones = torch.ones(case.channels, dtype=case.parameter_dtype, device=world.device)
    args, mask = NormalizeArgs(_EPS, ones, ones), (True, True, True, False)
    packed = kernel.moments(x)
    _, saved = kernel.normalize(x, packed, args, None)
    reduced = kernel.backward_reduce(dy, saved, mask)
    calls: dict[str, Callable[[], object]] = {
        "moments": partial(kernel.moments, x),
        "normalize": partial(kernel.normalize, x, packed, args, None),
        "backward_reduce": partial(kernel.backward_reduce, dy, saved, mask),
        "backward_elemt": partial(kernel.backward_elemt, saved, reduced, reduced.sums),
        _COPY: partial(torch.empty_like(x).copy_, x),
    }
    times = interleave(calls, rounds, barrier=world.barrier, clock=clock)
    share = {s: times[_COPY] / times[s] * factor / _COPY_TRAFFIC for s, factor in TRAFFIC.items()}
    return KernelCost(
        case,
        name,
        seconds={step: Percentiles.of(time) for step, time in times.items()},
        share={step: Percentiles.of(ratio) for step, ratio in share.items()},
    )
