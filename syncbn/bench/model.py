"""What batch norm makes of whole training steps of a ResNet: torch's, ours, ours synchronized."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import kernels
from syncbn.bench import resnet20, resnet50
from syncbn.bench.layer_cases import DTYPES, LAYOUTS
from syncbn.bench.memory import peak_bytes
from syncbn.bench.mpirun import slowest
from syncbn.bench.ranks import begin, is_gpu
from syncbn.bench.report import Benchmark, Report, Table, at_least, given, machine_facts, one_of
from syncbn.bench.sgd import training_step
from syncbn.bench.timing import Spread, captured, finished, take_turns
from syncbn.distributed.groups import GroupLike
from syncbn.fusion import fuse
from syncbn.nn.conversion import convert_sync_batchnorm
from syncbn.nn.module import SyncBatchNorm

_NETWORKS = {
    "resnet20": (resnet20.resnet20, resnet20.CLASSES),
    "resnet50": (resnet50.resnet50, resnet50.CLASSES),
}
_BASELINE, _NONE = "nn.BatchNorm2d", "no batch norm"
_MILLISECOND, _MIB = 1e-3, 1 << 20


@dataclass(frozen=True)
class StepCost:
    """What a training step costs; seconds on the slowest rank.

    Attributes:
        norm: what is in the network.
        step: seconds.
        ratio: to the step with nn.BatchNorm2d of the same round.
        norms: seconds that are due to batch norm: step - step without any, of the same round.
        peak_bytes: of tensors at once, without weights and the optimizer's.
    """

    norm: str
    step: Spread
    ratio: Spread
    norms: Spread
    peak_bytes: int


@dataclass
class Model(Benchmark):
    """The benchmark; `configs/bench/model.yaml` explains the settings.

    Attributes:
        device: "cpu" or "cuda"; None for what there is.
        network: "resnet20" or "resnet50".
        batch: images a rank; None for what the device is used with, as below.
        size: height and width of the images.
        layout: "contiguous" or "channels_last", or None.
        dtype: of the computation: "float32", or a half type for autocast, or None.
        kernel: of ours.
        graph: whether steps are captured in CUDA graphs, and replayed.
        steps: training steps with each norm.
    """

    device: str | None
    network: str
    batch: int | None
    size: int
    layout: str | None
    dtype: str | None
    kernel: str
    graph: bool
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("device", [self.device], ["cpu", "cuda", None])
        on_gpu = is_gpu(self.device)
        self._images = given(self.batch, 64 if on_gpu else 4)
        self._layout = given(self.layout, "channels_last" if on_gpu else "contiguous")
        self._dtype = given(self.dtype, "bfloat16" if on_gpu else "float32")
        one_of("network", [self.network], _NETWORKS)
        at_least("batch", self._images, 2)
        at_least("size", self.size, 32)
        one_of("layout", [self._layout], LAYOUTS)
        one_of("dtype", [self._dtype], ["float32", "bfloat16", "float16"])
        one_of("kernel", [self.kernel], kernels.IMPLS)
        if self.graph and not on_gpu:
            raise ValueError("graph: got true; expected false, since steps do not run on a GPU")
        at_least("steps", self.steps, 1)

    def run(self) -> Report:
        """Measure; every rank calls this."""
        world = begin(self.device)
        if self.graph and world.size > 1:
            raise ValueError(f"graph: got true; expected false, for {world.size} ranks")
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        make, classes = _NETWORKS[self.network]
        network = make()
        images = torch.randn(self._images, 3, self.size, self.size, device=world.device)
        images = images.contiguous(memory_format=LAYOUTS[self._layout])
        labels = torch.randint(classes, (self._images,), device=world.device)
        half = None if self._dtype == "float32" else DTYPES[self._dtype]
        steps = {
            name: training_step(self._parallel(net, world.device), images, labels, half)
            for name, net in self._networks(network, world.size).items()
        }
        launched = {name: captured(step) if self.graph else step for name, step in steps.items()}
        timed = {name: finished(step, world.device) for name, step in launched.items()}
        times = take_turns(timed, self.steps, meet=world.meet)
        walls = {name: slowest(taken.wall) for name, taken in times.items()}
        found = [
            StepCost(
                name,
                step=Spread.of(wall),
                ratio=Spread.of(wall / walls[_BASELINE]),
                norms=Spread.of(wall - walls[_NONE]),
                peak_bytes=peak_bytes(steps[name], world.device),
            )
            for name, wall in walls.items()
        ]
        if world.size > 1:
            # Gloo may abort a process that leaves while it still works.
            dist.barrier()
        return Report({**machine_facts(), **world.facts}, [self._table(found)], {"steps": found})

    def _networks(self, network: nn.Module, ranks: int) -> dict[str, nn.Module]:
        found = {_NONE: _without(copy.deepcopy(network)), _BASELINE: network}
        groups: dict[str, GroupLike] = {"ours": 1}
        if ranks > 1:
            groups[f"ours, {ranks} ranks"] = None
        for name, group in groups.items():
            net = convert_sync_batchnorm(copy.deepcopy(network), group)
            for layer in net.modules():
                if isinstance(layer, SyncBatchNorm):
                    layer.impl = self.kernel
            found[name] = net
            found[f"{name}, fused"] = copy.deepcopy(net)
            fuse(found[f"{name}, fused"])
        return found

    def _parallel(self, network: nn.Module, device: torch.device) -> nn.Module:
        layout: Any = {"memory_format": LAYOUTS[self._layout]}
        network = network.to(device, **layout)
        return DistributedDataParallel(network) if dist.get_world_size() > 1 else network

    def _table(self, found: list[StepCost]) -> Table:
        rows = [
            [
                cost.norm,
                cost.step.text(_MILLISECOND),
                cost.ratio.text(digits=2),
                cost.norms.text(_MILLISECOND) if cost.norm != _NONE else "",
                f"{cost.peak_bytes / _MIB:.0f}",
            ]
            for cost in found
        ]
        how = ", in a CUDA graph" if self.graph else ""
        return Table(
            f"Training step of {self.network}, {self._images} images of {self.size}x{self.size} a "
            f"rank, {self._layout}, {self._dtype}{how}",
            ["", "step, ms", f"/ {_BASELINE}", "batch norm, ms", "MiB"],
            rows,
            [
                "Median (10th..90th percentile). Batch norm: step - step of the network without "
                "any. MiB: of tensors at once, without weights and the optimizer's. Fused: by "
                "syncbn.fuse.",
            ],
        )


def _without(network: nn.Module) -> nn.Module:
    """Replace every batch norm by nothing."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return network
