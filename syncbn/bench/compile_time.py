"""Time of torch.compile for a network with torch's batch norm, and with ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch._inductor.config as inductor
from torch import nn

from syncbn.bench.networks import resnet20, training_step
from syncbn.bench.ranks import init_world, use_gpu
from syncbn.bench.report import Benchmark, Report, Table
from syncbn.bench.timing import MILLISECOND, PERCENTILES, Percentiles, cpu_clock, synchronized
from syncbn.nn.module import convert_sync_batchnorm

_BASELINE, _OURS = "nn.BatchNorm2d", "ours"
_STEPS = 9


@dataclass(frozen=True)
class CompileCost:
    """Cost of a compiled network."""

    norm: str  # batch norm in the network
    first: Percentiles  # seconds of the first training step, which compiles
    ratio: Percentiles  # first over first of nn.BatchNorm2d, by round
    step: Percentiles  # seconds of a compiled step


@dataclass
class CompileTime(Benchmark):
    """Settings of the benchmark; `configs/bench/compile.yaml` explains them."""

    device: str | None
    backend: str
    batch: int
    size: int
    rounds: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks != 1:
            raise ValueError(f"ranks: got {self.ranks}; expected 1: compilers would share the CPUs")
        use_gpu(self.device)
        self.check_one_of("backend", [self.backend], ["inductor", "aot_eager"])
        self.check_at_least(2, batch=self.batch)
        self.check_at_least(8, size=self.size)
        self.check_at_least(1, rounds=self.rounds)

    def run(self) -> Report:
        """Measure."""
        world = init_world(self.device, self.threads)
        makers = {_BASELINE: resnet20, _OURS: lambda: convert_sync_batchnorm(resnet20())}
        firsts: dict[str, list[float]] = {norm: [] for norm in makers}
        steps: dict[str, list[float]] = {norm: [] for norm in makers}
        with inductor.patch(force_disable_caches=True):
            # One more of the baseline, as the first compilation imports the compiler.
            for norm in [_BASELINE, *list(makers) * self.rounds]:
                torch._dynamo.reset()
                step = self._prepare_step(makers[norm](), world.device)
                firsts[norm].append(cpu_clock(step))
                steps[norm] += [cpu_clock(step) for _ in range(_STEPS)]
        costs = []
        baseline = torch.tensor(firsts[_BASELINE][1:])
        for norm in makers:
            first = torch.tensor(firsts[norm][-self.rounds :])
            seconds = first, first / baseline, torch.tensor(steps[norm][-self.rounds * _STEPS :])
            costs.append(CompileCost(norm, *(Percentiles.of(t.double()) for t in seconds)))
        return Report(world.facts, [self._table(costs)], {"costs": costs})

    def _prepare_step(self, net: nn.Module, device: torch.device) -> Callable[[], object]:
        torch.manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size, device=device)
        compiled = torch.compile(net.to(device), fullgraph=True, backend=self.backend)
        return synchronized(training_step(cast(nn.Module, compiled), images), device)

    def _table(self, costs: list[CompileCost]) -> Table:
        rows = [
            [c.norm, c.first.text(digits=1), c.ratio.text(digits=2), c.step.text(MILLISECOND)]
            for c in costs
        ]
        return Table(
            f"torch.compile of resnet20, {self.backend}, {self.batch} images of "
            f"{self.size}x{self.size}: {PERCENTILES}",
            ["", "first step, s", f"/ {_BASELINE}", "compiled step, ms"],
            rows,
        )
