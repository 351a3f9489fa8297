"""What torch.compile takes for a network: with torch's batch norm, and with ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch._inductor.config as inductor
from torch import nn

from syncbn.bench.ranks import begin
from syncbn.bench.report import Benchmark, Report, Table, at_least, machine_facts, one_of
from syncbn.bench.resnet20 import CLASSES, resnet20
from syncbn.bench.sgd import training_step
from syncbn.bench.timing import Spread, finished, take_turns
from syncbn.nn.conversion import convert_sync_batchnorm

_THEIRS, _OURS = "nn.BatchNorm2d", "ours"
_MILLISECOND = 1e-3


@dataclass(frozen=True)
class CompileCost:
    """What a network costs before its first step is done, and then.

    Attributes:
        norm: what is in the network.
        first: seconds of the first training step, which compiles.
        ratio: to that with nn.BatchNorm2d of the same round.
        step: seconds of a step once it is compiled.
    """

    norm: str
    first: Spread
    ratio: Spread
    step: Spread


@dataclass
class CompileTime(Benchmark):
    """The benchmark; `configs/bench/compile.yaml` explains the settings.

    Attributes:
        device: "cpu" or "cuda"; None for what there is.
        backend: of torch.compile.
        batch: images.
        size: height and width of the images.
        rounds: how often each network is compiled.
    """

    device: str | None
    backend: str
    batch: int
    size: int
    rounds: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks != 1:
            raise ValueError(f"ranks: got {self.ranks}; expected 1: compilers would share the CPUs")
        one_of("device", [self.device], ["cpu", "cuda", None])
        one_of("backend", [self.backend], ["inductor", "aot_eager"])
        at_least("batch", self.batch, 2)
        at_least("size", self.size, 8)
        at_least("rounds", self.rounds, 1)

    def run(self) -> Report:
        """Measure."""
        world = begin(self.device)
        torch.set_num_threads(self.threads)
        makes: dict[str, Callable[[], nn.Module]] = {
            _THEIRS: resnet20,
            _OURS: lambda: convert_sync_batchnorm(resnet20()),
        }
        compiles = {
            name: partial(self._first_step, make, world.device) for name, make in makes.items()
        }
        with inductor.patch(force_disable_caches=True):
            taken = take_turns(compiles, self.rounds, warm_up=1)
        firsts = {name: times.wall for name, times in taken.items()}
        steps = {name: self._compiled(make, world.device) for name, make in makes.items()}
        times = take_turns({name: finished(step, world.device) for name, step in steps.items()}, 9)
        found = [
            CompileCost(
                name,
                Spread.of(first),
                Spread.of(first / firsts[_THEIRS]),
                Spread.of(times[name].wall),
            )
            for name, first in firsts.items()
        ]
        return Report({**machine_facts(), **world.facts}, [self._table(found)], {"costs": found})

    def _compiled(self, make: Callable[[], nn.Module], device: torch.device) -> Callable[[], None]:
        torch.manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size, device=device)
        labels = torch.randint(CLASSES, (self.batch,), device=device)
        net = torch.compile(make().to(device), fullgraph=True, backend=self.backend)
        return training_step(cast(nn.Module, net), images, labels)

    def _first_step(self, make: Callable[[], nn.Module], device: torch.device) -> None:
        torch._dynamo.reset()
        self._compiled(make, device)()

    def _table(self, found: list[CompileCost]) -> Table:
        return Table(
            f"torch.compile of resnet20, {self.backend}, {self.batch} images of "
            f"{self.size}x{self.size}: median (10th..90th percentile)",
            ["", "first step, s", f"/ {_THEIRS}", "a step then, ms"],
            [
                [
                    cost.norm,
                    cost.first.text(digits=1),
                    cost.ratio.text(digits=2),
                    cost.step.text(_MILLISECOND),
                ]
                for cost in found
            ],
        )
