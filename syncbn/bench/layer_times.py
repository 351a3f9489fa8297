"""Forward and backward of layers: torch's and ours, on a single rank and synchronized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncFunction

from syncbn.bench.layer_cases import Case, name_epilogues
from syncbn.bench.memory import peak_bytes
from syncbn.bench.ranks import World, max_over_ranks
from syncbn.bench.timing import Clock, Percentiles, interleave
from syncbn.distributed.groups import resolve_group
from syncbn.kernels.activations import Activation, apply_activation
from syncbn.nn.module import SyncBatchNorm2d

BASELINE, TORCH_SYNC, COPY = "nn.BatchNorm2d", "nn.SyncBatchNorm", "copy"


@dataclass(frozen=True)
class LayerCost:
    """Cost of forward and backward of one layer; seconds on the slowest rank."""

    name: str  # layer or kernel
    ranks: int  # number of ranks that share statistics
    epilogue: str  # operations after the layer, of name_epilogues()
    step: Percentiles  # seconds
    ratio: Percentiles  # step over step of nn.BatchNorm2d with the same epilogue, by round
    peak_bytes: int  # without inputs and output gradient

    @property
    def title(self) -> str:
        """Name in tables and plots."""
        return self.name if self.ranks == 1 else f"{self.name}, {self.ranks} ranks"


@dataclass(frozen=True)
class CaseCosts:
    """Costs of all layers on one input."""

    case: Case
    copy: Percentiles  # seconds of a copy of the input to allocated memory
    layers: list[LayerCost]  # nn.BatchNorm2d first


@dataclass(frozen=True)
class _Layer:
    name: str
    ranks: int
    epilogue: str
    adds: bool
    forward: Callable[[Tensor, Tensor], Tensor]
    parameters: list[nn.Parameter]

    def step(self, x: Tensor, residual: Tensor, dy: Tensor) -> None:
        inputs = [x, residual] if self.adds else [x]
        torch.autograd.grad(self.forward(x, residual), [*inputs, *self.parameters], dy)


class TorchSyncBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` in training, with its own kernels and collectives for one rank, too.

    The forward of torch calls ``F.batch_norm`` for ``world_size == 1``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x, shape ``[N, C, *]``, on a GPU."""
        tensors = self.weight, self.bias, self.running_mean, self.running_var
        group, size = dist.group.WORLD, dist.get_world_size()
        y: Tensor = TorchSyncFunction.apply(x, *tensors, self.eps, self.momentum, group, size)
        return y


def time_layers(
    case: Case,
    kernels: list[str],
    activation: Activation,
    rounds: int,
    world: World,
    clock: Clock,
    burst: int = 1,
) -> CaseCosts:
    """Time every layer on one input, on every rank; see :func:`interleave`."""
    x, residual, dy = (case.tensor(world.device) for _ in range(3))
    x.requires_grad_()
    residual.requires_grad_()
    layers = _make_layers(case, kernels, activation, world)
    calls: dict[str, Callable[[], object]] = {COPY: partial(torch.empty_like(dy).copy_, dy)}
    for i, layer in enumerate(layers):
        calls[str(i)] = partial(layer.step, x, residual, dy)

    def barrier() -> None:
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        world.barrier()

    times = interleave(calls, rounds, burst, barrier, clock=clock)
    seconds = {name: max_over_ranks(time) for name, time in times.items()}
    baselines = {layer.epilogue: seconds[str(i)] for i, layer in enumerate(layers[:3])}
    costs = [
        LayerCost(
            layer.name,
            layer.ranks,
            layer.epilogue,
            step=Percentiles.of(seconds[str(i)]),
            ratio=Percentiles.of(seconds[str(i)] / baselines[layer.epilogue]),
            peak_bytes=peak_bytes(calls[str(i)], world.device),
        )
        for i, layer in enumerate(layers)
    ]
    return CaseCosts(case, Percentiles.of(seconds[COPY]), costs)


def _make_layers(
    case: Case, kernels: list[str], activation: Activation, world: World
) -> list[_Layer]:
    options: dict[str, Any] = {"device": world.device, "dtype": case.parameter_dtype}
    baseline: nn.Module = nn.BatchNorm2d(case.channels, **options)
    weights = list(baseline.parameters())
    act = partial(apply_activation, activation=activation)
    epilogues = name_epilogues(activation.name)
    forwards: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, _: baseline(x),
        lambda x, _: act(baseline(x)),
        lambda x, r: act(baseline(x).add_(r)),
    ]
    layers = [
        _Layer(BASELINE, 1, epilogue, i == 2, forward, weights)
        for i, (epilogue, forward) in enumerate(zip(epilogues, forwards, strict=True))
    ]
    if world.device.type == "cuda":  # it rejects CPU tensors
        other: nn.Module = TorchSyncBatchNorm(case.channels, **options)
        weights = list(other.parameters())
        layers.append(_Layer(TORCH_SYNC, world.size, "", False, lambda x, _: other(x), weights))
    groups = {1: resolve_group(1), world.size: dist.group.WORLD}
    for kernel, (size, group), epilogue in product(kernels, groups.items(), epilogues):
        options["activation"] = activation.name if epilogue else None
        ours = SyncBatchNorm2d(case.channels, process_group=group, **options)
        ours.impl = kernel
        adds = epilogue == epilogues[2]
        forward = partial(_forward, ours, adds)
        layers.append(_Layer(kernel, size, epilogue, adds, forward, list(ours.parameters())))
    return layers


def _forward(layer: nn.Module, with_residual: bool, x: Tensor, residual: Tensor) -> Tensor:
    y: Tensor = layer(x, residual) if with_residual else layer(x)
    return y
