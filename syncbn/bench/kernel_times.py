"""The functions of kernels by themselves: which share of a copy's bandwidth they reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from syncbn import kernels
from syncbn.bench.layer_cases import Case
from syncbn.bench.timing import Spread, clock_of, take_turns
from syncbn.kernels import Forward, Kernel, Transform

#: How many times the tensor's bytes each must read or write. A copy: twice.
TRAFFIC = {"moments": 1, "normalize": 2, "backward_reduce": 2, "backward_elemt": 3}
_COPY_TRAFFIC = 2
_EPS = 1e-5
_ONE = "one thread: "


@dataclass(frozen=True)
class KernelCost:
    """What the functions of a kernel cost on one input.

    Attributes:
        case: the input.
        kernel: its name.
        relu: whether a ReLU is part of it.
        seconds: by function; and of a "copy", to memory that is there already.
        share: by function, its bandwidth over that of the copy in the same round; all it must read
            and write counts, once.
        speedup: by function, its time with one thread over that with all; none if there is one.
    """

    case: Case
    kernel: str
    relu: bool
    seconds: dict[str, Spread]
    share: dict[str, Spread]
    speedup: dict[str, Spread]


def measure(
    case: Case, name: str, relu: bool, rounds: int, device: torch.device, meet: Callable[[], None]
) -> KernelCost:
    """Time the functions of a kernel on one input; every rank must call this, for itself.

    Args:
        case: the input.
        name: of the kernel.
        relu: whether a ReLU is part of it.
        rounds: in which each function takes its turn.
        device: of the tensors.
        meet: ranks wait for each other here.
    """
    x, dy = case.tensor(device), case.tensor(device)
    kernel = kernels.choose(name, x)
    target = torch.empty_like(x)
    functions = _functions(kernel, x, dy, relu, case.parameters)
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
        relu,
        seconds={name: Spread.of(times[name].wall) for name in ("copy", *TRAFFIC)},
        share={
            name: Spread.of(copy / times[name].wall * traffic / _COPY_TRAFFIC)
            for name, traffic in TRAFFIC.items()
        },
        speedup={name: Spread.of(wall / times[name].wall) for name, wall in single.items()},
    )


def _with_one_thread(call: Callable[[], object]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    call()
    torch.set_num_threads(threads)


def _functions(
    kernel: Kernel, x: Tensor, dy: Tensor, relu: bool, parameters: torch.dtype
) -> dict[str, Callable[[], object]]:
    ones = torch.ones(x.shape[1], dtype=parameters, device=x.device)
    message, forward = kernel.moments(x), Forward(_EPS, ones, ones, relu)
    _, statistics = kernel.normalize(x, message, forward)
    how = Transform(statistics, ones, ones, relu)
    sums, _, _ = kernel.backward_reduce(dy, x, how)
    return {
        "moments": partial(kernel.moments, x),
        "normalize": partial(kernel.normalize, x, message, forward),
        "backward_reduce": partial(kernel.backward_reduce, dy, x, how),
        "backward_elemt": partial(kernel.backward_elemt, dy, x, how, sums),
    }
