"""The functions of kernels by themselves: which share of a copy's bandwidth they reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from syncbn import kernels
from syncbn.bench.layer_cases import ADDITION, NOTHING, RELU, Case
from syncbn.bench.timing import Spread, clock_of, take_turns
from syncbn.kernels import Forward, Kernel, Transform
from syncbn.kernels.gated import is_gated

#: How many times the tensor's bytes each must read or write, by itself. A copy: twice.
TRAFFIC = {"moments": 1, "normalize": 2, "backward_reduce": 2, "backward_elemt": 3}
_COPY_TRAFFIC, _GATE = 2, 1 / 16
_EPS = 1e-5
_ONE = "one thread: "


@dataclass(frozen=True)
class KernelCost:
    """What the functions of a kernel cost on one input.

    Attributes:
        case: the input.
        kernel: its name.
        after: what follows in the same pass, of :func:`follows`.
        seconds: by function; and of a "copy", to memory that is there already.
        share: by function, its bandwidth over that of the copy in the same round; all it must read
            and write counts, once.
        speedup: by function, its time with one thread over that with all; none if there is one.
    """

    case: Case
    kernel: str
    after: str
    seconds: dict[str, Spread]
    share: dict[str, Spread]
    speedup: dict[str, Spread]


def follows(name: str, device: torch.device) -> list[str]:
    """Return what a kernel's functions do in the same pass: forward and backward."""
    kernel = kernels.choose(name, torch.empty(1, 1, device=device))
    return [NOTHING, RELU, *([ADDITION] if is_gated(kernel) else [])]


def traffic(after: str) -> dict[str, float]:
    """Return how many times the tensor's bytes each function must read or write."""
    if after != ADDITION:
        return {**TRAFFIC}
    # Forward the residual and the gate, backward the gate and the residual's gradient.
    more = 1 + _GATE
    both = {name: TRAFFIC[name] + more for name in ("normalize", "backward_reduce")}
    return {**TRAFFIC, **both}


def measure(
    case: Case, name: str, after: str, rounds: int, device: torch.device, meet: Callable[[], None]
) -> KernelCost:
    """Time the functions of a kernel on one input; every rank must call this, for itself.

    Args:
        case: the input.
        name: of the kernel.
        after: what follows in the same pass.
        rounds: in which each function takes its turn.
        device: of the tensors.
        meet: ranks wait for each other here.
    """
    x, dy = case.tensor(device), case.tensor(device)
    kernel = kernels.choose(name, x)
    target = torch.empty_like(x)
    functions = _functions(kernel, x, dy, after, case.parameters)
    calls: dict[str, Callable[[], object]] = {
        "copy": partial(target.copy_, x),
        **functions,
    }
    if device.type == "cpu" and torch.get_num_threads() > 1:
        calls |= {_ONE + f: partial(_with_one_thread, call) for f, call in functions.items()}
    times = take_turns(calls, rounds, meet=meet, clock=clock_of(device))
    copy = times["copy"].wall
    single = {name: times[_ONE + name].wall for name in TRAFFIC if _ONE + name in times}
    return KernelCost(
        case,
        name,
        after,
        seconds={name: Spread.of(times[name].wall) for name in ("copy", *TRAFFIC)},
        share={
            name: Spread.of(copy / times[name].wall * passes / _COPY_TRAFFIC)
            for name, passes in traffic(after).items()
        },
        speedup={name: Spread.of(wall / times[name].wall) for name, wall in single.items()},
    )


def _with_one_thread(call: Callable[[], object]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call()
    finally:
        torch.set_num_threads(threads)


def _functions(
    kernel: Kernel, x: Tensor, dy: Tensor, after: str, parameters: torch.dtype
) -> dict[str, Callable[[], object]]:
    ones = torch.ones(x.shape[1], dtype=parameters, device=x.device)
    gate = kernel.new_gate(x) if after == ADDITION and is_gated(kernel) else None
    residual = None if gate is None else dy
    message, forward = kernel.moments(x), Forward(_EPS, ones, ones, after != NOTHING, gate=gate)
    _, statistics = kernel.normalize(x, message, forward, residual)
    how = Transform(statistics, ones, ones, after == RELU)
    sums, _, _ = kernel.backward_reduce(dy, x, how)
    reduce: Callable[[], object] = partial(kernel.backward_reduce, dy, x, how)
    if gate is not None and is_gated(kernel):
        reduce = partial(kernel.backward_reduce_gated, dy, gate, x, how)
    return {
        "moments": partial(kernel.moments, x),
        "normalize": partial(kernel.normalize, x, message, forward, residual),
        "backward_reduce": reduce,
        "backward_elemt": partial(kernel.backward_elemt, dy, x, how, sums),
    }
