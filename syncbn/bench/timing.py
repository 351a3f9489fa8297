"""Times of calls that take turns, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

#: Runs a call; returns the seconds that it took, and those that this process had a CPU.
Clock: TypeAlias = Callable[[Callable[[], object]], tuple[float, float]]

# The first rounds pay for memory, connections and DDP's buckets.
_WARM_UP_ROUNDS = 2
# Bytes, several times the L2 cache of any GPU, read often enough to take it four milliseconds: by
# then the host has launched what is to be measured, unless that waits for the GPU. Written, they
# would have to leave the cache for what is measured, at its expense.
_FILLING, _FILLINGS = 1 << 29, 32


@dataclass(frozen=True)
class Spread:
    """The middle of some values, and the range that holds four fifths of them.

    Attributes:
        median: of the values.
        low: their 10th percentile.
        high: their 90th percentile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """Return the spread of a vector of float64."""
        low, median, high = values.quantile(values.new_tensor([0.1, 0.5, 0.9])).tolist()
        return cls(median, low, high)

    def text(self, unit: float = 1.0, digits: int | None = None) -> str:
        """Return ``median (low..high)`` in multiples of a unit.

        Args:
            unit: of the values.
            digits: after the point; None for none from ten on, and one below.
        """
        median, low, high = (value / unit for value in astuple(self))
        if digits is None:
            digits = 0 if abs(median) >= 10 else 1
        return f"{median:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


class Times(NamedTuple):
    """What one of the calls took, each time.

    Attributes:
        wall: ``[rounds * burst]`` float64, seconds.
        cpu: ``[rounds * burst]`` float64, seconds that this process, all threads, had a CPU.
    """

    wall: Tensor
    cpu: Tensor


def on_host(call: Callable[[], object]) -> tuple[float, float]:
    """Run a call; return the seconds that it took here."""
    cpu, start = time.process_time(), time.perf_counter()
    call()
    end = time.perf_counter()
    return end - start, time.process_time() - cpu


class OnDevice:
    """A clock of a GPU: the seconds that it works at a call, whose inputs are in no cache.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._filling = torch.zeros(_FILLING // 4, device=device)

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        """Run a call; return the seconds that it took."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_FILLINGS):
            self._filling.sum()
        start.record()
        cpu = time.process_time()
        call()
        cpu = time.process_time() - cpu
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, cpu


def clock_of(device: torch.device) -> Clock:
    """Return a clock for work on a device."""
    return OnDevice(device) if device.type == "cuda" else on_host


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    burst: int = 1,
    meet: Callable[[], None] = lambda: None,
    warm_up: int = _WARM_UP_ROUNDS,
    clock: Clock = on_host,
) -> dict[str, Times]:
    """Measure calls in turns.

    Args:
        calls: what to measure, by name.
        rounds: how often each gets its turn, in an order that is drawn anew, the same on all ranks.
        burst: calls a turn, in a row.
        meet: called before each turn, and not measured; ranks that measure together wait for each
            other here.
        warm_up: rounds before, which do not count.
        clock: measures a call.

    Returns:
        The times of each call. The i-th time of one belongs to the i-th of another.
    """
    clocks: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    names, order = list(calls), random.Random(0)
    for _ in range(warm_up + rounds):
        order.shuffle(names)
        for name in names:
            call, times = calls[name], clocks[name]
            meet()
            times += [clock(call) for _ in range(burst)]
    skipped = warm_up * burst
    return {
        name: Times(*torch.tensor(times[skipped:], dtype=torch.float64).unbind(1))
        for name, times in clocks.items()
    }


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Return a replay of what a call does on the current GPU, without what it does on the host.

    Args:
        call: must not wait for the GPU; is called some times to warm up.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP_ROUNDS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def finished(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a call that ends when the device is done with it."""

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run if device.type == "cuda" else call
