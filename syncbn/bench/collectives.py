"""All-reduces and training steps over MPI, over the backend mpi4py and over Gloo."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from syncbn.bench.networks import resnet20, training_step
from syncbn.bench.ranks import World, init_world, max_over_ranks
from syncbn.bench.report import Benchmark, Report, Table
from syncbn.bench.timing import MICROSECOND, MILLISECOND, PERCENTILES, Percentiles, interleave
from syncbn.distributed.groups import resolve_group
from syncbn.nn.module import convert_sync_batchnorm

# Consecutive calls, as in other benchmarks of MPI: the call is measured, not cache misses.
_BURST = 20


@dataclass(frozen=True)
class AllReduce:
    """Seconds of an all-reduce on the slowest rank."""

    numel: int  # float64 values in the vector
    raw: Percentiles  # MPI_Allreduce in place, called from mpi4py
    mpi4py: Percentiles  # torch's all_reduce over mpi4py
    gloo: Percentiles  # torch's all_reduce over Gloo
    overhead: Percentiles  # mpi4py - raw, call by call
    ratio: Percentiles  # gloo / mpi4py, call by call


@dataclass(frozen=True)
class TrainingStep:
    """Seconds of a training step on the slowest rank."""

    local: Percentiles  # without communication
    mpi4py: Percentiles
    gloo: Percentiles
    synchronization: dict[str, Percentiles]  # step - local, round by round, by transport
    ratio: float  # ratio of the medians of synchronization, mpi4py / gloo


@dataclass
class Collectives(Benchmark):
    """Settings of the benchmark; `configs/bench/collectives.yaml` explains them."""

    sizes: list[int]
    repeats: int
    batch: int
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(2, ranks=self.ranks)
        self.check_at_least(1, sizes=self.sizes, repeats=self.repeats)
        self.check_at_least(1, batch=self.batch, steps=self.steps)

    def run(self) -> Report:
        """Measure, on every rank.

        Raises:
            ImportError: mpi4py or an MPI library is missing.
            RuntimeError: the ranks were not started by mpirun.
        """
        world = init_world("cpu", self.threads, "mpi4py")
        # Imported late: the import starts MPI, which must not happen before exec_mpirun.
        from syncbn.distributed.mpi import VERSION

        gloo = dist.new_group(backend="gloo")
        sums = [self._time_all_reduce(numel, gloo, world) for numel in self.sizes]
        step = self._time_step(gloo, world)
        return Report(
            {"MPI": VERSION, **world.facts},
            [_all_reduce_table(sums), _step_table(step, self.batch)],
            {"all_reduce": sums, "training_step": step},
        )

    def _time_all_reduce(self, numel: int, gloo: dist.ProcessGroup, world: World) -> AllReduce:
        from syncbn.distributed.mpi import MPI

        # mpi4py takes an array of the standard library like one of NumPy.
        memory = array("d", bytes(8 * numel))
        vector = torch.zeros(numel, dtype=torch.float64)
        calls: dict[str, Callable[[], object]] = {
            "raw": partial(MPI.COMM_WORLD.Dup().Allreduce, MPI.IN_PLACE, memory),
            "mpi4py": partial(dist.all_reduce, vector),
            "gloo": partial(dist.all_reduce, vector, group=gloo),
        }
        burst = min(_BURST, self.repeats)
        times = interleave(calls, -(-self.repeats // burst), burst, world.barrier)
        raw, mpi4py, gloos = map(max_over_ranks, times.values())
        columns = raw, mpi4py, gloos, mpi4py - raw, gloos / mpi4py
        return AllReduce(numel, *map(Percentiles.of, columns))

    def _time_step(self, gloo: dist.ProcessGroup, world: World) -> TrainingStep:
        torch.manual_seed(0)
        network = resnet20()
        torch.manual_seed(1 + world.rank)
        images = torch.randn(self.batch, 3, 32, 32)
        groups = {"local": resolve_group(1), "mpi4py": dist.group.WORLD, "gloo": gloo}
        calls = {}
        for name, group in groups.items():
            model = convert_sync_batchnorm(copy.deepcopy(network), group)
            if name != "local":
                model = DistributedDataParallel(model, process_group=group)
            calls[name] = training_step(model, images)
        times = interleave(calls, self.steps, barrier=world.barrier)
        local, mpi4py, gloos = map(max_over_ranks, times.values())
        waits = {"mpi4py": Percentiles.of(mpi4py - local), "gloo": Percentiles.of(gloos - local)}
        ratio = waits["mpi4py"].median / waits["gloo"].median
        steps = Percentiles.of(local), Percentiles.of(mpi4py), Percentiles.of(gloos)
        return TrainingStep(*steps, waits, ratio)


def _all_reduce_table(sums: list[AllReduce]) -> Table:
    rows = []
    for row in sums:
        times = row.raw, row.mpi4py, row.gloo, row.overhead
        rows.append([str(row.numel), *(t.text(MICROSECOND) for t in times), row.ratio.text()])
    return Table(
        f"all_reduce of float64 values, microseconds: {PERCENTILES}",
        ["values", "MPI", "mpi4py", "gloo", "mpi4py - MPI", "gloo / mpi4py"],
        rows,
        ["MPI: MPI_Allreduce in place from mpi4py. Times of the slowest rank, call by call."],
    )


def _step_table(step: TrainingStep, batch: int) -> Table:
    rows = [["none", step.local.text(MILLISECOND), ""]]
    for name, time in (("mpi4py", step.mpi4py), ("gloo", step.gloo)):
        synchronization = step.synchronization[name].text(MILLISECOND)
        rows.append([name, time.text(MILLISECOND), synchronization])
    return Table(
        f"Training step of ResNet-20 with DDP, {batch} images a rank, milliseconds: {PERCENTILES}",
        ["transport", "step", "synchronization"],
        rows,
        [
            "Synchronization: step minus the step without communication in the same round. "
            f"mpi4py / gloo: {step.ratio:.2f}."
        ],
    )
