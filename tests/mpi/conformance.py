"""Conformance suite for transports: each collective with all dtypes and layouts.

=====================  ===============================================
conformance_cases.py   groups, dtypes, layouts, inputs, expected values
conformance_calls.py   table of collectives with their calls on a case
=====================  ===============================================
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product, zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tests.mpi.conformance_calls import COLLECTIVES
from tests.mpi.conformance_cases import LARGE, Call, Case

_SECONDS_TO_COMPLETE = 5.0
#: Collectives that Gloo supports in every way, for dense tensors of real numbers.
GLOO = ("all_reduce", "broadcast", "all_gather", "gather", "scatter", "all_to_all")


class Attempt(NamedTuple):
    """A call and the way to start and complete it."""

    case: Case
    call: Call
    way: str

    def __str__(self) -> str:
        return f"{self.call.operation} {self.call.detail} of {self.case}, {self.way}"

    def error(self) -> str:
        """Make the call; return its error, or an empty string."""
        try:
            WAYS[self.way](self.call)
            for output, expected in zip(self.call.outputs, self.call.expected, strict=True):
                if not torch.equal(_bytes(output), _bytes(expected)):
                    return f"got {_shown(output)}, expected {_shown(expected)}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def is_supported_by_gloo(self) -> bool:
        real = self.case.dtype in (torch.float32, torch.float64)
        dense = self.case.layout not in ("sliced", "channels_last", "uneven")
        return real and dense and self.call.operation != "PREMUL_SUM"


def run(rank: int, transport: str, name: str) -> list[str]:
    """Attempt all calls of a collective; return the errors."""
    return [
        f"{name} {attempt}: {error}"
        for attempt in attempts(name)
        if transport != "gloo" or attempt.is_supported_by_gloo()
        if (error := attempt.error())
    ]


def attempts(name: str) -> Iterator[Attempt]:
    """Yield calls of a collective, identical on all ranks.

    Every dtype is combined with every layout, large ones excepted. Of many calls every third is
    made, with an offset such that every dtype and every layout is combined with every operation.
    Groups and ways are random.
    """
    collective = COLLECTIVES[name]
    pairs = product(enumerate(collective.dtypes), enumerate(collective.layouts))
    for (row, dtype), (column, layout) in pairs:
        if layout in LARGE and dtype is not torch.float32:
            continue
        draw = random.Random(f"{name} {dtype} {layout}")
        case = Case(*draw.choice(create_groups()), dtype, layout)
        calls = list(collective.calls(case))
        for call in calls if len(calls) < 3 else calls[(row + column) % 3 :: 3]:
            yield Attempt(case, call, draw.choice(list(WAYS)))


@cache
def create_groups() -> list[tuple[Any, tuple[int, ...]]]:
    """Return this rank's group and its members, for several partitions of three ranks."""
    groups = []
    for partition in ([(0, 1, 2)], [(2, 0, 1)], [(2, 0), (1,)]):
        for members in partition:
            group = dist.new_group(list(members), sort_ranks=False)
            if dist.get_rank() in members:
                groups.append((group, members))
    return groups


def _blocking(call: Call) -> None:
    for work in call.start(async_op=False) or ():
        work.wait()


def _waited(call: Call) -> None:
    for work in _started(call):
        work.wait()
        assert work.is_completed(), "waited for, but not completed"


def _polled(call: Call) -> None:
    deadline = time.monotonic() + _SECONDS_TO_COMPLETE
    for work in _started(call):
        while not work.is_completed():
            assert time.monotonic() < deadline, "never completed"
            time.sleep(0)
        work.wait()  # raises the errors


def _future(call: Call) -> None:
    results = [work.get_future().wait() for work in _started(call)]
    _compare(results, call.outputs)


def _then(call: Call) -> None:
    futures = [work.get_future() for work in _started(call)]
    copies = [future.then(lambda done: [x.clone() for x in done.value()]) for future in futures]
    _compare([copy.wait() for copy in copies], call.outputs)


#: Ways to start and complete a call.
WAYS = {
    "blocking": _blocking,
    "waited for": _waited,
    "polled": _polled,
    "future": _future,
    "then": _then,
}


def _started(call: Call) -> list[Any]:
    works = call.start(async_op=True)
    return works if isinstance(works, list) else [works]


def _compare(results: Sequence[Sequence[Tensor]], outputs: Sequence[Tensor]) -> None:
    if not results:
        return  # a call that returned no work had ended
    # Sends come after the works that fill the outputs; their results are the sent tensors.
    tensors = [tensor for result in results for tensor in result][: len(outputs)]
    for tensor, output in zip_longest(tensors, outputs):
        assert torch.equal(_bytes(tensor), _bytes(output)), "the future has other values"


def _shown(tensor: Tensor) -> str:
    return " ".join(map(str, tensor.flatten()[:9].tolist()))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
