"""What messages cost on MPI and on Gloo: alone, and in a training step."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from syncbn.bench.report import Benchmark, Report, at_least, machine_facts
from syncbn.distributed.environment import init_process_group


@dataclass
class Collectives(Benchmark):
    """The benchmark; `configs/bench/collectives.yaml` explains the settings.

    Attributes:
        sizes: float64 numbers in the all-reduces.
        repeats: calls of each.
        batch: images of a training step, a rank.
        steps: training steps on each transport.
    """

    sizes: list[int]
    repeats: int
    batch: int
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("ranks", self.ranks, 2)
        for size in self.sizes:
            at_least("sizes", size, 1)
        at_least("repeats", self.repeats, 1)
        at_least("batch", self.batch, 1)
        at_least("steps", self.steps, 1)

    def run(self) -> Report:
        """Measure; every rank calls this.

        Raises:
            ImportError: mpi4py or an MPI library is missing.
            RuntimeError: the ranks were not started by mpirun.
        """
        place = init_process_group("mpi4py")
        # Imported here: they start MPI, which a process that becomes mpirun must not.
        from syncbn.bench import all_reduce, training_step
        from syncbn.distributed.mpi import VERSION

        torch.set_num_threads(self.threads)
        gloo = dist.new_group(backend="gloo")
        sums = all_reduce.measure(self.sizes, self.repeats, gloo)
        step = training_step.measure(self.batch, self.steps, gloo)
        # Gloo may abort a process that leaves while it still works.
        dist.barrier(gloo)
        return Report(
            {
                **machine_facts(),
                "MPI": VERSION,
                "ranks": f"{place.world_size}, each on {_cpus()} of the CPUs",
            },
            [all_reduce.table(sums), training_step.table(step, self.batch)],
            {"all_reduce": sums, "training_step": step},
        )


def _cpus() -> int:
    # mpirun binds two ranks to a core each; Linux only.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
