"""What a layer costs: forward and backward, beside nn.BatchNorm and a copy of the tensor."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from syncbn import kernels
from syncbn.bench import host_overhead, kernel_times, launches, layer_tables, layer_times
from syncbn.bench.layer_cases import DTYPES, LAYOUTS, Case
from syncbn.bench.memory import keep_freed_memory
from syncbn.bench.ranks import begin, is_gpu
from syncbn.bench.report import (
    Benchmark,
    Report,
    at_least,
    given,
    in_a_folder,
    machine_facts,
    one_of,
)


@dataclass
class Layers(Benchmark):
    """The benchmark; `configs/bench/layers.yaml` explains the settings.

    Attributes:
        png: file for the picture; None for none.
        device: "cpu" or "cuda"; None for what there is.
        shapes: of inputs, without the batch: "64x56x56".
        batch: samples a rank; None for what the device is used with, as below.
        layouts: keys of :data:`LAYOUTS`.
        dtypes: keys of :data:`DTYPES`, or None.
        kernels: names that :func:`syncbn.kernels.choose` knows, or None.
        rounds: in which all layers take their turn.
    """

    png: str | None
    device: str | None
    shapes: list[str]
    batch: int | None
    layouts: list[str]
    dtypes: list[str] | None
    kernels: list[str] | None
    rounds: int

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("device", [self.device], ["cpu", "cuda", None])
        on_gpu = is_gpu(self.device)
        self._samples = given(self.batch, 64 if on_gpu else 16)
        self._dtypes = given(self.dtypes, ["bfloat16", "float32"] if on_gpu else ["float32"])
        self._kernels = given(self.kernels, ["auto", "aten_cuda" if on_gpu else "reference"])
        in_a_folder("png", self.png)
        at_least("batch", self._samples, 1)
        at_least("rounds", self.rounds, 1)
        one_of("layouts", self.layouts, LAYOUTS)
        one_of("dtypes", self._dtypes, DTYPES)
        one_of("kernels", self._kernels, kernels.IMPLS)
        if not self.cases():
            raise ValueError(
                "shapes, layouts, dtypes: got none of one; expected one or more of each"
            )

    def cases(self) -> list[Case]:
        """Return what is measured: every shape in every layout and dtype."""
        return [
            Case(shape, self._samples, layout, dtype)
            for dtype, layout, shape in product(self._dtypes, self.layouts, self.shapes)
        ]

    def run(self) -> Report:
        """Measure; every rank calls this."""
        world = begin(self.device)
        torch.set_num_threads(self.threads)
        cases, device, meet = self.cases(), world.device, world.meet
        layers = [
            layer_times.measure(case, self._kernels, self.rounds, device, meet) for case in cases
        ]
        overheads = [
            host_overhead.measure(device, backward, self.rounds, meet) for backward in (False, True)
        ]
        on_gpu = device.type == "cuda"
        counted = layer_times.launched(cases[0], self._kernels, device) if on_gpu else []
        # From here on what is freed stays, for what kernels write to be there already.
        reused = on_gpu or keep_freed_memory()
        functions = [
            kernel_times.measure(case, name, after, self.rounds, device, meet)
            for name in self._kernels
            for after in kernel_times.follows(name, device)
            for case in cases
        ]
        if world.size > 1:
            # Gloo may abort a process that leaves while it still works.
            dist.barrier()
        if self.png is not None and world.rank == 0:
            from syncbn.bench.layer_plot import draw

            draw(layers, functions, Path(self.png))
        return Report(
            {**machine_facts(), **world.facts},
            [
                *layer_tables.ratios(layers),
                *layer_tables.bandwidth(functions, reused),
                *layer_tables.speedup(functions, self.threads),
                layer_tables.memory(layers),
                layer_tables.overhead(overheads, world.size),
                *([launches.table(counted, cases[0].shape)] if counted else []),
            ],
            {"layers": layers, "kernels": functions, "overheads": overheads, "launches": counted},
        )
