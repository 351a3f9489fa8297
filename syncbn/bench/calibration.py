"""What a calibration costs: time in plain passes over the same batches, and memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from syncbn.bench.memory import peak_bytes
from syncbn.bench.report import Benchmark, Report, Table, at_least, machine_facts
from syncbn.bench.resnet20 import resnet20
from syncbn.bench.timing import Spread, take_turns
from syncbn.calibration import recalibrate
from syncbn.nn.bn_layers import find_layers

_CPU = torch.device("cpu")
_OWN = "own forward"
_MILLISECOND = 1e-3
_MIB = 1 << 20


@dataclass(frozen=True)
class Cost:
    """What was found for one calibration set, method and batch size.

    Attributes:
        size: height and width of the images.
        method: of the calibration; "own forward" is lockstep with a forward of the user's own, for
            which small batches are not computed together.
        batch: samples.
        plain: seconds of a pass in inference mode over the same batches.
        calibration: seconds.
        ratio: calibration / plain, round by round.
        plain_bytes: most memory that the tensors of the plain pass had at once.
        bytes: those of the calibration.
    """

    size: int
    method: str
    batch: int
    plain: Spread
    calibration: Spread
    ratio: Spread
    plain_bytes: int
    bytes: int


@dataclass
class Calibration(Benchmark):
    """The benchmark; `configs/bench/calibration.yaml` explains the settings.

    Attributes:
        sizes: height and width of the images in each calibration set.
        samples: number of images in each.
        batches: batch sizes for lockstep.
        repeats: passes, and calibrations in lockstep.
        sequential_batch: batch size for sequential.
        sequential_repeats: calibrations in sequence.
    """

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
        for size, samples in zip(self.sizes, self.samples, strict=True):
            at_least("sizes", size, 4)
            at_least("samples", samples, 2)
        for batch in self.batches:
            at_least("batches", batch, 1)
        at_least("repeats", self.repeats, 1)
        at_least("sequential_batch", self.sequential_batch, 1)
        at_least("sequential_repeats", self.sequential_repeats, 1)

    def run(self) -> Report:
        """Measure."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        net = resnet20().eval()
        costs: list[Cost] = []
        giants: dict[str, int] = {}
        for size, number in zip(self.sizes, self.samples, strict=True):
            images = torch.randn(number, 3, size, size)
            small = [batch for batch in self.batches if batch <= number]
            costs += [
                _measure(method, batch, net, images, self.repeats)
                for batch in small
                for method in ("lockstep", _OWN)
            ]
            last = "sequential", self.sequential_batch
            costs.append(_measure(*last, net, images, self.sequential_repeats))
            giants[f"{size}x{size}, one giant batch of {number}"] = peak_bytes(
                partial(_plain, net, [images]), _CPU
            )
        layers = len(find_layers(net))
        return Report(
            {**machine_facts(), "network": f"ResNet-20, {layers} batch-norm layers"},
            [_times(costs, layers), _memory(costs, giants)],
            {"layers": layers, "costs": costs, "giant_batch_bytes": giants},
        )


def _measure(method: str, batch: int, net: nn.Module, images: Tensor, repeats: int) -> Cost:
    batches = images.split(batch)
    plain = partial(_plain, net, batches)
    calibration = partial(
        recalibrate,
        net,
        batches,
        method="sequential" if method == "sequential" else "lockstep",
        forward=_forward if method == _OWN else None,
        progress=False,
    )
    times = take_turns({"plain": plain, "calibration": calibration}, repeats)
    pass_time, time = times["plain"].wall, times["calibration"].wall
    return Cost(
        size=images.shape[-1],
        method=method,
        batch=batch,
        plain=Spread.of(pass_time),
        calibration=Spread.of(time),
        ratio=Spread.of(time / pass_time),
        plain_bytes=peak_bytes(plain, _CPU),
        bytes=peak_bytes(calibration, _CPU),
    )


def _plain(net: nn.Module, batches: list[Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            net(batch)


def _forward(net: nn.Module, batch: Tensor) -> object:
    return net(batch)


def _times(costs: list[Cost], layers: int) -> Table:
    rows = [
        [
            _name(cost),
            cost.plain.text(_MILLISECOND),
            cost.calibration.text(_MILLISECOND),
            cost.ratio.text(digits=2),
        ]
        for cost in costs
    ]
    return Table(
        "A calibration beside a plain evaluation pass over the same batches, milliseconds: median "
        "(10th..90th percentile)",
        ["", "pass", "calibration", "calibration / pass"],
        rows,
        [f"In sequence, {layers} layers are {layers} passes, of which the early ones end early."],
    )


def _memory(costs: list[Cost], giants: dict[str, int]) -> Table:
    rows = [
        [_name(cost), f"{cost.plain_bytes / _MIB:.1f}", f"{cost.bytes / _MIB:.1f}"]
        for cost in costs
    ]
    rows += [[name, f"{giant / _MIB:.1f}", ""] for name, giant in giants.items()]
    return Table(
        "Most memory of tensors at once, without weights and data, MiB",
        ["", "pass", "calibration"],
        rows,
    )


def _name(cost: Cost) -> str:
    return f"{cost.size}x{cost.size}, {cost.method}, batch {cost.batch}"
