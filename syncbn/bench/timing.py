"""Times of interleaved calls, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import TypeAlias

import torch
from torch import Tensor

#: Runs a call and returns its duration in seconds.
Clock: TypeAlias = Callable[[Callable[[], object]], float]
MICROSECOND, MILLISECOND = 1e-6, 1e-3
PERCENTILES = "median (10th..90th percentile)"

# The first rounds allocate memory, connections and DDP's buckets.
_WARM_UP_ROUNDS = 2
# Bytes, several times the L2 cache of any GPU, and number of reads: 4 ms of work, enough for the
# CPU to launch the measured call meanwhile. Writes would have to leave the cache during the call.
_FLUSH_BYTES, _FLUSHES = 1 << 29, 32


@dataclass(frozen=True)
class Percentiles:
    """Median, 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Percentiles:
        """Return the percentiles of a float64 vector."""
        low, median, high = values.quantile(values.new_tensor([0.1, 0.5, 0.9])).tolist()
        return cls(median, low, high)

    def text(self, unit: float = 1.0, digits: int | None = None) -> str:
        """Return ``median (low..high)`` in a unit; by default with one decimal below 10."""
        median, low, high = (value / unit for value in astuple(self))
        if digits is None:
            digits = 0 if abs(median) >= 10 else 1
        return f"{median:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def cpu_clock(call: Callable[[], object]) -> float:
    """Return the seconds until a call returns."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def device_clock(device: torch.device) -> Clock:
    """Return a clock of the work on a device; on a GPU, with cold caches."""
    if device.type != "cuda":
        return cpu_clock
    flushed = torch.zeros(_FLUSH_BYTES // 4, device=device)

    def clock(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_FLUSHES):
            flushed.sum()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return clock


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    burst: int = 1,
    barrier: Callable[[], None] = lambda: None,
    warm_up: int = _WARM_UP_ROUNDS,
    clock: Clock = cpu_clock,
) -> dict[str, Tensor]:
    """Time calls in rounds of one turn each.

    The order in a round is random, and equal on all ranks.

    Args:
        calls: functions to time, by name.
        rounds: number of timed rounds.
        burst: consecutive calls per turn.
        barrier: function called before each turn, untimed.
        warm_up: number of untimed rounds before.
        clock: clock of one call.

    Returns:
        Seconds by name, float64, shape ``[rounds * burst]``. Equal indices belong to one round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, order = list(calls), random.Random(0)
    for _ in range(warm_up + rounds):
        order.shuffle(names)
        for name in names:
            barrier()
            times[name] += [clock(calls[name]) for _ in range(burst)]
    skipped = warm_up * burst
    return {name: torch.tensor(t[skipped:], dtype=torch.float64) for name, t in times.items()}


def capture_graph(call: Callable[[], object]) -> Callable[[], None]:
    """Capture a call in a CUDA graph and return its replay; the call runs twice to warm up."""
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


def synchronized(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a call that returns when the device has completed its work."""

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run if device.type == "cuda" else call
