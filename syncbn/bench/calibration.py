"""Time of a calibration over a plain pass over the same batches, and peak memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.bench.memory import peak_bytes
from syncbn.bench.networks import resnet20
from syncbn.bench.report import Benchmark, Report, Table
from syncbn.bench.timing import MILLISECOND, PERCENTILES, Percentiles, interleave
from syncbn.calibration import recalibrate
from syncbn.nn.bn_layers import find_layers

_CPU = torch.device("cpu")
_MIB = 1 << 20
# Arguments of recalibrate, by name in the report. With a forward of the user's own, lockstep does
# not compute small batches together.
_METHODS: dict[str, dict[str, Any]] = {
    "lockstep": {"method": "lockstep"},
    "own forward": {"method": "lockstep", "forward": lambda net, batch: net(batch)},
    "sequential": {"method": "sequential"},
}


@dataclass(frozen=True)
class Cost:
    """Cost of one calibration set, method and batch size."""

    size: int  # height and width of the images
    method: str  # key of _METHODS
    batch: int
    plain: Percentiles  # seconds of a pass in inference mode over the same batches
    calibration: Percentiles  # seconds
    ratio: Percentiles  # calibration / plain, round by round
    plain_bytes: int  # peak memory of the plain pass
    bytes: int  # peak memory of the calibration


@dataclass
class Calibration(Benchmark):
    """Settings of the benchmark; `configs/bench/calibration.yaml` explains them."""

    sizes: list[int]
    samples: list[int]
    batches: list[int]
    repeats: int
    sequential_batch: int
    sequential_repeats: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks != 1:
            raise ValueError(f"ranks: got {self.ranks}; expected 1, it measures one process")
        if len(self.samples) != len(self.sizes):
            raise ValueError(f"samples: got {self.samples}; expected as many as sizes {self.sizes}")
        self.check_at_least(4, sizes=self.sizes)
        self.check_at_least(2, samples=self.samples)
        self.check_at_least(1, batches=self.batches, repeats=self.repeats)
        self.check_at_least(1, sequential_batch=self.sequential_batch)
        self.check_at_least(1, sequential_repeats=self.sequential_repeats)

    def run(self) -> Report:
        """Measure."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        net = resnet20().eval()
        costs: list[Cost] = []
        giants: dict[str, int] = {}
        for size, samples in zip(self.sizes, self.samples, strict=True):
            images = torch.randn(samples, 3, size, size)
            for batch in self.batches:
                if batch <= samples:
                    costs.append(_measure("lockstep", batch, net, images, self.repeats))
                    costs.append(_measure("own forward", batch, net, images, self.repeats))
            repeats = self.sequential_repeats
            costs.append(_measure("sequential", self.sequential_batch, net, images, repeats))
            name = f"{size}x{size}, one giant batch of {samples}"
            giants[name] = peak_bytes(partial(_run_plain, net, [images]), _CPU)
        layers = len(find_layers(net))
        return Report(
            {"network": f"ResNet-20, {layers} batch-norm layers"},
            [_time_table(costs, layers), _memory_table(costs, giants)],
            {"layers": layers, "costs": costs, "giant_batch_bytes": giants},
        )


def _measure(method: str, batch: int, net: nn.Module, images: Tensor, repeats: int) -> Cost:
    batches = images.split(batch)
    plain = partial(_run_plain, net, batches)
    calibration = partial(recalibrate, net, batches, progress=False, **_METHODS[method])
    times = interleave({"plain": plain, "calibration": calibration}, repeats)
    return Cost(
        images.shape[-1],
        method,
        batch,
        plain=Percentiles.of(times["plain"]),
        calibration=Percentiles.of(times["calibration"]),
        ratio=Percentiles.of(times["calibration"] / times["plain"]),
        plain_bytes=peak_bytes(plain, _CPU),
        bytes=peak_bytes(calibration, _CPU),
    )


def _run_plain(net: nn.Module, batches: list[Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            net(batch)


def _time_table(costs: list[Cost], layers: int) -> Table:
    rows = []
    for cost in costs:
        times = cost.plain.text(MILLISECOND), cost.calibration.text(MILLISECOND)
        rows.append([_row_name(cost), *times, cost.ratio.text(digits=2)])
    return Table(
        f"Calibration and plain evaluation pass over the same batches, milliseconds: {PERCENTILES}",
        ["", "pass", "calibration", "calibration / pass"],
        rows,
        [f"Sequential: {layers} passes, one a layer; the pass of an early layer ends early."],
    )


def _memory_table(costs: list[Cost], giants: dict[str, int]) -> Table:
    rows = [[_row_name(c), *(f"{b / _MIB:.1f}" for b in (c.plain_bytes, c.bytes))] for c in costs]
    rows += [[name, f"{giant / _MIB:.1f}", ""] for name, giant in giants.items()]
    title = "Peak memory of tensors, without weights and data, MiB"
    return Table(title, ["", "pass", "calibration"], rows)


def _row_name(cost: Cost) -> str:
    return f"{cost.size}x{cost.size}, {cost.method}, batch {cost.batch}"
