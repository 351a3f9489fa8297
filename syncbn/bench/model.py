"""Training steps of a ResNet with torch's batch norm, with ours, and with ours synchronized."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import kernels
from syncbn.bench.layer_cases import DTYPES, LAYOUTS
from syncbn.bench.memory import peak_bytes
from syncbn.bench.networks import NETWORKS, training_step
from syncbn.bench.ranks import init_world, max_over_ranks, use_gpu
from syncbn.bench.report import Benchmark, Report, Table, default_if_none
from syncbn.bench.timing import MILLISECOND, Percentiles, capture_graph, interleave, synchronized
from syncbn.distributed.groups import GroupLike
from syncbn.fusion import fuse
from syncbn.nn.module import SyncBatchNorm, convert_sync_batchnorm

_BASELINE, _NONE = "nn.BatchNorm2d", "no batch norm"
_MIB = 1 << 20


@dataclass(frozen=True)
class StepCost:
    """Cost of a training step; seconds on the slowest rank."""

    norm: str  # batch norm in the network
    step: Percentiles  # seconds
    ratio: Percentiles  # step over step of nn.BatchNorm2d, by round
    norms: Percentiles  # step - step without batch norm, in the same round
    peak_bytes: int  # without weights and optimizer state


@dataclass
class Model(Benchmark):
    """Settings of the benchmark; `configs/bench/model.yaml` explains them."""

    device: str | None
    network: str
    batch: int | None
    size: int
    layout: str | None
    dtype: str | None
    impl: str
    graph: bool
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        gpu = use_gpu(self.device)
        self._images = default_if_none(self.batch, 64 if gpu else 4)
        self._layout = default_if_none(self.layout, "channels_last" if gpu else "contiguous")
        self._dtype = default_if_none(self.dtype, "bfloat16" if gpu else "float32")
        self.check_one_of("network", [self.network], NETWORKS)
        self.check_at_least(2, batch=self._images)
        self.check_at_least(32, size=self.size)
        self.check_one_of("layout", [self._layout], LAYOUTS)
        self.check_one_of("dtype", [self._dtype], ["float32", "bfloat16", "float16"])
        self.check_one_of("impl", [self.impl], kernels.IMPLS)
        if self.graph and not gpu:
            raise ValueError("graph: got true; expected false, since steps do not run on a GPU")
        self.check_at_least(1, steps=self.steps)

    def run(self) -> Report:
        """Measure, on every rank."""
        world = init_world(self.device, self.threads)
        device = world.device
        if self.graph and world.size > 1:
            raise ValueError(f"graph: got true; expected false, for {world.size} ranks")
        torch.manual_seed(0)
        network = NETWORKS[self.network]()
        images = torch.randn(self._images, 3, self.size, self.size, device=device)
        images = images.contiguous(memory_format=LAYOUTS[self._layout])
        half = None if self._dtype == "float32" else DTYPES[self._dtype]
        steps = {
            norm: training_step(self._prepare(net, device), images, half)
            for norm, net in self._networks(network, world.size).items()
        }
        launches = {n: capture_graph(step) if self.graph else step for n, step in steps.items()}
        timed = {norm: synchronized(launch, device) for norm, launch in launches.items()}
        times = interleave(timed, self.steps, barrier=world.barrier)
        seconds = {norm: max_over_ranks(time) for norm, time in times.items()}
        costs = []
        for norm, time in seconds.items():
            step, ratio = Percentiles.of(time), Percentiles.of(time / seconds[_BASELINE])
            norms, peak = Percentiles.of(time - seconds[_NONE]), peak_bytes(steps[norm], device)
            costs.append(StepCost(norm, step, ratio, norms, peak))
        return Report(world.facts, [self._table(costs)], {"steps": costs})

    def _networks(self, network: nn.Module, ranks: int) -> dict[str, nn.Module]:
        networks = {_NONE: _remove_norms(copy.deepcopy(network)), _BASELINE: network}
        groups: dict[str, GroupLike] = {"ours": 1}
        if ranks > 1:
            groups[f"ours, {ranks} ranks"] = None
        for name, group in groups.items():
            net = convert_sync_batchnorm(copy.deepcopy(network), group)
            for layer in net.modules():
                if isinstance(layer, SyncBatchNorm):
                    layer.impl = self.impl
            networks[name] = net
            networks[f"{name}, fused"] = copy.deepcopy(net)
            fuse(networks[f"{name}, fused"])
        return networks

    def _prepare(self, network: nn.Module, device: torch.device) -> nn.Module:
        layout: Any = {"memory_format": LAYOUTS[self._layout]}
        network = network.to(device, **layout)
        return DistributedDataParallel(network) if dist.get_world_size() > 1 else network

    def _table(self, costs: list[StepCost]) -> Table:
        rows = []
        for cost in costs:
            times = cost.step.text(MILLISECOND), cost.ratio.text(digits=2)
            norms = cost.norms.text(MILLISECOND) if cost.norm != _NONE else ""
            rows.append([cost.norm, *times, norms, f"{cost.peak_bytes / _MIB:.0f}"])
        graph = ", in a CUDA graph" if self.graph else ""
        return Table(
            f"Training step of {self.network}, {self._images} images of {self.size}x{self.size} a "
            f"rank, {self._layout}, {self._dtype}{graph}",
            ["", "step, ms", f"/ {_BASELINE}", "batch norm, ms", "MiB"],
            rows,
            [
                "Median (10th..90th percentile). Batch norm: step minus step without batch norm. "
                "MiB: peak memory, without weights and optimizer state. Fused: by syncbn.fuse."
            ],
        )


def _remove_norms(network: nn.Module) -> nn.Module:
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return network
