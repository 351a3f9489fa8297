"""All-reduces and training steps over Gloo; under mpirun also over MPI and the backend mpi4py."""

from __future__ import annotations

import copy
import os
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
from syncbn.distributed.launchers import find_launcher
from syncbn.nn.module import convert_sync_batchnorm

# Consecutive calls, as in other benchmarks of MPI: the call is measured, not cache misses.
_BURST = 20


@dataclass(frozen=True)
class AllReduce:
    """Seconds of an all-reduce on the slowest rank."""

    numel: int  # float64 values in the vector
    # "gloo" and "mpi4py": torch's all_reduce; "MPI": MPI_Allreduce in place, called from mpi4py.
    seconds: dict[str, Percentiles]
    overhead: Percentiles | None  # mpi4py - MPI, call by call
    ratio: Percentiles | None  # gloo / mpi4py, call by call


@dataclass(frozen=True)
class TrainingStep:
    """Seconds of a training step on the slowest rank."""

    seconds: dict[str, Percentiles]  # "local": without communication; by transport
    synchronization: dict[str, Percentiles]  # step - local, round by round, by transport


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
            ImportError: the launcher belongs to MPI, and mpi4py or an MPI library is missing.
        """
        launcher = find_launcher(os.environ)
        backend = "mpi4py" if launcher is not None and launcher.address == "MPI" else "gloo"
        world = init_world("cpu", self.threads, backend)
        default, facts = dist.group.WORLD, world.facts
        assert default is not None
        groups = {"gloo": default}
        if backend == "mpi4py":
            # Imported late: the import starts MPI, which must not happen before exec_mpirun.
            from syncbn.distributed.mpi import VERSION

            groups = {"mpi4py": default, "gloo": dist.new_group(backend="gloo")}
            facts = {"MPI": VERSION, **facts}
        sums = [self._time_all_reduce(numel, groups, world) for numel in self.sizes]
        step = self._time_step(groups, world)
        return Report(
            facts,
            [_all_reduce_table(sums), _step_table(step, self.batch)],
            {"all_reduce": sums, "training_step": step},
        )

    def _time_all_reduce(
        self, numel: int, groups: dict[str, dist.ProcessGroup], world: World
    ) -> AllReduce:
        vector = torch.zeros(numel, dtype=torch.float64)
        calls: dict[str, Callable[[], object]] = {
            name: partial(dist.all_reduce, vector, group=group) for name, group in groups.items()
        }
        if "mpi4py" in groups:
            from syncbn.distributed.mpi import MPI

            # mpi4py takes an array of the standard library like one of NumPy.
            memory = array("d", bytes(8 * numel))
            calls["MPI"] = partial(MPI.COMM_WORLD.Dup().Allreduce, MPI.IN_PLACE, memory)
        burst = min(_BURST, self.repeats)
        times = interleave(calls, -(-self.repeats // burst), burst, world.barrier)
        slowest = {name: max_over_ranks(seconds) for name, seconds in times.items()}
        overhead = ratio = None
        if "mpi4py" in groups:
            overhead = Percentiles.of(slowest["mpi4py"] - slowest["MPI"])
            ratio = Percentiles.of(slowest["gloo"] / slowest["mpi4py"])
        seconds = {name: Percentiles.of(values) for name, values in slowest.items()}
        return AllReduce(numel, seconds, overhead, ratio)

    def _time_step(self, groups: dict[str, dist.ProcessGroup], world: World) -> TrainingStep:
        torch.manual_seed(0)
        network = resnet20()
        torch.manual_seed(1 + world.rank)
        images = torch.randn(self.batch, 3, 32, 32)
        local = convert_sync_batchnorm(copy.deepcopy(network), resolve_group(1))
        calls = {"local": training_step(local, images)}
        for name, group in groups.items():
            model = convert_sync_batchnorm(copy.deepcopy(network), group)
            parallel = DistributedDataParallel(model, process_group=group)
            calls[name] = training_step(parallel, images)
        times = interleave(calls, self.steps, barrier=world.barrier)
        slowest = {name: max_over_ranks(seconds) for name, seconds in times.items()}
        waits = {name: Percentiles.of(slowest[name] - slowest["local"]) for name in groups}
        steps = {name: Percentiles.of(values) for name, values in slowest.items()}
        return TrainingStep(steps, waits)


def _all_reduce_table(sums: list[AllReduce]) -> Table:
    columns, rows = ["values", *sums[0].seconds], []
    if sums[0].ratio is not None:
        columns += ["mpi4py - MPI", "gloo / mpi4py"]
    for row in sums:
        cells = [time.text(MICROSECOND) for time in row.seconds.values()]
        if row.overhead is not None and row.ratio is not None:
            cells += [row.overhead.text(MICROSECOND), row.ratio.text()]
        rows.append([str(row.numel), *cells])
    notes = ["Times of the slowest rank, call by call."]
    if "MPI" in columns:
        notes.append("MPI: MPI_Allreduce in place from mpi4py.")
    return Table(f"all_reduce of float64 values, microseconds: {PERCENTILES}", columns, rows, notes)


def _step_table(step: TrainingStep, batch: int) -> Table:
    rows = [["none", step.seconds["local"].text(MILLISECOND), ""]]
    for name, synchronization in step.synchronization.items():
        times = step.seconds[name], synchronization
        rows.append([name, *(time.text(MILLISECOND) for time in times)])
    return Table(
        f"Training step of ResNet-20 with DDP, {batch} images a rank, milliseconds: {PERCENTILES}",
        ["transport", "step", "synchronization"],
        rows,
        ["Synchronization: step minus the step without communication in the same round."],
    )
