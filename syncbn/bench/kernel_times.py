"""Bandwidth of the steps of a kernel, as a share of the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from syncbn import kernels
from syncbn.bench.layer_cases import Case
from syncbn.bench.ranks import World
from syncbn.bench.timing import Clock, Percentiles, interleave
from syncbn.kernels.base import NormalizeArgs, Reduced, Saved

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
    steps = _KernelSteps(case, name, world.device)
    calls: dict[str, Callable[[], object]] = {step: getattr(steps, step) for step in TRAFFIC}
    calls[_COPY] = partial(torch.empty_like(steps.x).copy_, steps.x)
    times = interleave(calls, rounds, barrier=world.barrier, clock=clock)
    share = {s: times[_COPY] / times[s] * factor / _COPY_TRAFFIC for s, factor in TRAFFIC.items()}
    return KernelCost(
        case,
        name,
        seconds={step: Percentiles.of(time) for step, time in times.items()},
        share={step: Percentiles.of(ratio) for step, ratio in share.items()},
    )


class _KernelSteps:
    """Calls of the kernel contract, one method per step."""

    def __init__(self, case: Case, name: str, device: torch.device) -> None:
        self.x, self.dy = case.tensor(device), case.tensor(device)
        self.kernel = kernels.select_kernel(name, self.x)
        ones = torch.ones(case.channels, dtype=case.parameter_dtype, device=device)
        self.args = NormalizeArgs(_EPS, ones, ones)
        self.packed = self.moments()
        self.saved = self.normalize()[1]
        self.reduced = self.backward_reduce()

    def moments(self) -> Tensor:
        return self.kernel.moments(self.x)

    def normalize(self) -> tuple[Tensor, Saved]:
        return self.kernel.normalize(self.x, self.packed, self.args, None)

    def backward_reduce(self) -> Reduced:
        return self.kernel.backward_reduce(self.dy, self.saved, (True, True, True, False))

    def backward_elemt(self) -> Tensor:
        return self.kernel.backward_elemt(self.saved, self.reduced, self.reduced.sums)
