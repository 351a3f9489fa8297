"""Cost of a layer beside nn.BatchNorm2d, and of its kernels beside a copy of the tensor."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import cast

import torch

from syncbn import kernels
from syncbn.bench.kernel_times import TRAFFIC, KernelCost, time_kernel
from syncbn.bench.layer_cases import DTYPES, LAYOUTS, Case, name_epilogues
from syncbn.bench.layer_times import BASELINE, TORCH_SYNC, CaseCosts, time_layers
from syncbn.bench.memory import reuse_freed_memory
from syncbn.bench.ranks import init_world, use_gpu
from syncbn.bench.report import Benchmark, Report, Table, default_if_none
from syncbn.bench.timing import MICROSECOND, MILLISECOND, PERCENTILES, cpu_clock, device_clock
from syncbn.kernels.activations import NAMES, Activation, ActivationName

_MIB = 1 << 20
# Its arithmetic takes about a microsecond; the rest is CPU time of Python and of launches.
_TINY = Case("16x4x4", 2, "contiguous", "float32")
_TINY_BURST = 10


@dataclass
class Layers(Benchmark):
    """Settings of the benchmark; `configs/bench/layers.yaml` explains them."""

    png: str | None
    device: str | None
    shapes: list[str]
    batch: int | None
    layouts: list[str]
    dtypes: list[str] | None
    impls: list[str] | None
    activation: str
    rounds: int

    def __post_init__(self) -> None:
        super().__post_init__()
        gpu = use_gpu(self.device)
        batch = default_if_none(self.batch, 64 if gpu else 16)
        dtypes = default_if_none(self.dtypes, ["bfloat16", "float32"] if gpu else ["float32"])
        self._impls = default_if_none(self.impls, ["auto", "aten_cuda" if gpu else "reference"])
        self.check_writable("png", self.png)
        self.check_at_least(1, batch=batch, rounds=self.rounds)
        self.check_one_of("layouts", self.layouts, LAYOUTS)
        self.check_one_of("dtypes", dtypes, DTYPES)
        self.check_one_of("impls", self._impls, kernels.IMPLS)
        self.check_one_of("activation", [self.activation], NAMES)
        # The default slope of nn.LeakyReLU.
        self._activation = Activation(cast("ActivationName", self.activation), 0.01)
        settings = product(dtypes, self.layouts, self.shapes)
        self._cases = [Case(shape, batch, layout, dtype) for dtype, layout, shape in settings]
        if not self._cases:
            raise ValueError("shapes, layouts, dtypes: got an empty list; expected one or more")

    def run(self) -> Report:
        """Measure, on every rank."""
        world = init_world(self.device, self.threads)
        clock, rounds, names = device_clock(world.device), self.rounds, self._impls
        settings = names, self._activation, rounds, world
        layers = [time_layers(case, *settings, clock) for case in self._cases]
        tiny = time_layers(_TINY, *settings, cpu_clock, _TINY_BURST)
        # From here on freed memory is kept: kernels write to memory without page faults.
        reused = world.device.type == "cuda" or reuse_freed_memory()
        tasks = product(names, self._cases)
        steps = [time_kernel(case, name, rounds, world, clock) for name, case in tasks]
        if self.png is not None and world.rank == 0:
            from syncbn.bench.layer_plot import draw

            draw(layers, Path(self.png))
        groups = groupby(layers, lambda costs: (costs.case.layout, costs.case.dtype))
        epilogues = name_epilogues(self.activation)
        kinds = [(f"{layout}, {dtype}", list(costs)) for (layout, dtype), costs in groups]
        return Report(
            world.facts,
            [
                *(_ratio_table(kind, costs, e) for kind, costs in kinds for e in epilogues),
                *_bandwidth_tables(steps, reused),
                _overhead_table(tiny),
            ],
            {"layers": layers, "kernels": steps, "tiny_layer": tiny},
        )


def _ratio_table(kind: str, cases: list[CaseCosts], epilogue: str) -> Table:
    baseline = f"{BASELINE} + {epilogue}" if epilogue else BASELINE
    costs = [[layer for layer in case.layers if layer.epilogue == epilogue] for case in cases]
    rows = [
        [
            case.case.shape,
            f"{case.copy.median / MILLISECOND:.2f}",
            layers[0].step.text(MILLISECOND),
            *(layer.ratio.text(digits=2) for layer in layers[1:]),
        ]
        for case, layers in zip(cases, costs, strict=True)
    ]
    medians = [[layer.ratio.median for layer in layers[1:]] for layers in costs]
    means = torch.tensor(medians, dtype=torch.float64).log().mean(0).exp().tolist()
    rows.append(["geometric mean", "", "", *(f"{mean:.2f}" for mean in means)])
    names = [layer.name for layer in costs[0][1:]]
    if TORCH_SYNC in names:
        torch_mean = means[names.index(TORCH_SYNC)]
        rows.append([f"/ {TORCH_SYNC}", "", "", *(f"{mean / torch_mean:.2f}" for mean in means)])
    memory = [[layer.peak_bytes for layer in layers] for layers in costs]
    inputs = torch.tensor([[case.case.nbytes] for case in cases])
    peaks = (torch.tensor(memory) / inputs).median(0).values.tolist()
    rows.append(["peak memory / input", "", *(f"{peak:.2f}" for peak in peaks)])
    return Table(
        f"Forward and backward, {kind}: {PERCENTILES}",
        ["", "copy, ms", f"{baseline}, ms", *(layer.title for layer in costs[0][1:])],
        rows,
        [
            f"Other columns: time over that of {baseline} in the same round. Peak memory: median, "
            "without inputs and output gradient."
        ],
    )


def _bandwidth_tables(steps: list[KernelCost], reused: bool) -> list[Table]:
    notes = ["Each byte that must be read or written counts once."]
    if not reused:
        notes.append("malloc returns memory to the system here: steps that write have page faults.")
    tables = []
    groups = groupby(steps, lambda c: (c.kernel, c.case.layout, c.case.dtype))
    for (kernel, layout, dtype), costs in groups:
        rows = [
            [
                cost.case.shape,
                f"{cost.case.nbytes / _MIB:.1f}",
                f"{2 * cost.case.nbytes / cost.seconds['copy'].median / 1e9:.1f}",
                *(cost.share[step].text(0.01, 0) for step in TRAFFIC),
            ]
            for cost in costs
        ]
        title = f"Kernel {kernel}, {layout}, {dtype}: % of a copy's bandwidth"
        tables.append(Table(title, ["", "MiB", "copy, GB/s", *TRAFFIC], rows, notes))
    return tables


def _overhead_table(tiny: CaseCosts) -> Table:
    rows = [
        [layer.title, layer.epilogue, layer.step.text(MICROSECOND), layer.ratio.text(digits=2)]
        for layer in tiny.layers
    ]
    return Table(
        f"CPU time of a step, input {tiny.case.batch}x{tiny.case.shape}: {PERCENTILES}",
        ["", "then", "us", f"/ {BASELINE}"],
        rows,
    )
