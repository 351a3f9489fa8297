"""One all-reduce of float64 numbers: MPI itself, torch.distributed on mpi4py, and on Gloo."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from syncbn.bench.mpirun import meeting, slowest
from syncbn.bench.report import Table
from syncbn.bench.timing import Spread, take_turns
from syncbn.distributed.mpi import MPI

# In a row, as in other benchmarks of MPI: what is measured is the call, not what it finds evicted
# from the caches.
_BURST = 20
_MICROSECOND = 1e-6


@dataclass(frozen=True)
class AllReduce:
    """What was found for one length; times in seconds, on the slowest rank.

    Attributes:
        numel: numbers in the vector.
        raw: MPI_Allreduce in place, from mpi4py.
        mpi4py: torch's all_reduce on mpi4py.
        gloo: torch's all_reduce on Gloo.
        overhead: mpi4py - raw, call by call.
        ratio: gloo / mpi4py, call by call.
    """

    numel: int
    raw: Spread
    mpi4py: Spread
    gloo: Spread
    overhead: Spread
    ratio: Spread


def measure(numels: list[int], repeats: int, gloo: dist.ProcessGroup) -> list[AllReduce]:
    """Time all-reduces; every rank must call this.

    Args:
        numels: numbers in the vectors.
        repeats: calls of each, or a few more.
        gloo: all ranks; the default group is mpi4py's.
    """
    burst = min(_BURST, repeats)
    rounds = -(-repeats // burst)
    meet = meeting()
    found = []
    for numel in numels:
        times = take_turns(_calls(numel, gloo), rounds, burst, meet)
        raw, mpi4py, gloos = (slowest(time.wall) for time in times.values())
        columns = (raw, mpi4py, gloos, mpi4py - raw, gloos / mpi4py)
        found.append(AllReduce(numel, *map(Spread.of, columns)))
    return found


def table(found: list[AllReduce]) -> Table:
    """Return what :func:`measure` found as a table."""
    rows = []
    for row in found:
        times = (row.raw, row.mpi4py, row.gloo, row.overhead)
        cells = (spread.text(_MICROSECOND) for spread in times)
        rows.append([str(row.numel), *cells, row.ratio.text()])
    return Table(
        "all_reduce of float64 numbers, microseconds: median (10th..90th percentile)",
        ["numbers", "MPI", "mpi4py", "gloo", "mpi4py - MPI", "gloo / mpi4py"],
        rows,
        ["MPI: MPI_Allreduce in place from mpi4py. The slowest rank counts, call by call."],
    )


def _calls(numel: int, gloo: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    # An array of the standard library is to mpi4py what one of numpy is.
    memory = array("d", bytes(8 * numel))
    vector = torch.zeros(numel, dtype=torch.float64)
    communicator = MPI.COMM_WORLD.Dup()
    return {
        "raw": partial(communicator.Allreduce, MPI.IN_PLACE, memory),
        "mpi4py": partial(dist.all_reduce, vector),
        "gloo": partial(dist.all_reduce, vector, group=gloo),
    }
