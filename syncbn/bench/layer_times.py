"""Forward and backward of layers, in turns: torch's and ours, alone and synchronized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.bench.layer_cases import Case
from syncbn.bench.memory import peak_bytes
from syncbn.bench.mpirun import slowest
from syncbn.bench.timing import Spread, finished, take_turns
from syncbn.distributed.groups import resolve_group
from syncbn.functional import sync_batch_norm
from syncbn.module import SyncBatchNorm2d

BASELINE, COPY = "nn.BatchNorm2d", "copy"


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs; seconds on the slowest rank.

    Attributes:
        name: of the layer or kernel.
        ranks: whose batches are one.
        relu: whether a ReLU follows; ours is in the same pass.
        forward: seconds.
        step: seconds of forward and backward.
        ratio: of steps, to that of nn.BatchNorm2d (with its ReLU) in the same round.
        peak_bytes: of the tensors of a step at once, without input and output gradient.
    """

    name: str
    ranks: int
    relu: bool
    forward: Spread
    step: Spread
    ratio: Spread
    peak_bytes: int


@dataclass(frozen=True)
class CaseCosts:
    """What layers cost on one input.

    Attributes:
        case: the input.
        copy: seconds to copy it to memory that is there already.
        layers: nn.BatchNorm2d first.
    """

    case: Case
    copy: Spread
    layers: list[LayerCost]


class _Gradients:
    """Gives a new tensor for each backward pass, as the layer that follows would.

    Attributes:
        dy: its values.
        fresh: made before the clock starts.
    """

    def __init__(self, dy: Tensor) -> None:
        self.dy = dy
        self.refill()

    def refill(self) -> None:
        self.fresh: Tensor | None = self.dy.clone()


class _Given(torch.autograd.Function):
    """Something that has the gradients that it is given."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gradients: _Gradients) -> Tensor:
        ctx.gradients = gradients
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        dy, ctx.gradients.fresh = ctx.gradients.fresh, None
        return dy, None


@dataclass(frozen=True)
class _Layer:
    name: str
    ranks: int
    relu: bool
    call: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]

    @property
    def key(self) -> str:
        return f"{self.name} {self.ranks} {self.relu}"

    @property
    def baseline(self) -> str:
        return f"{BASELINE} 1 {self.relu}"


def measure(
    case: Case, kernels: list[str], rounds: int, device: torch.device, meet: Callable[[], None]
) -> CaseCosts:
    """Time every layer on one input; every rank must call this.

    Args:
        case: the input.
        kernels: of ours.
        rounds: in which each layer takes its turn.
        device: of the tensors.
        meet: ranks wait for each other here.
    """
    x, dy = case.tensor(device).requires_grad_(), case.tensor(device)
    layers = _layers(case, kernels, device)
    target, gradients = torch.empty_like(dy), _Gradients(dy)
    calls: dict[str, Callable[[], object]] = {COPY: partial(target.copy_, dy)}
    for layer in layers:
        calls[f"{layer.key} forward"] = partial(layer.call, x)
        calls[layer.key] = partial(_step, layer, x, gradients)

    def before() -> None:
        gradients.refill()
        meet()

    timed = {name: finished(call, device) for name, call in calls.items()}
    times = take_turns(timed, rounds, meet=before)
    walls = {name: slowest(taken.wall) for name, taken in times.items()}
    costs = [
        LayerCost(
            layer.name,
            layer.ranks,
            layer.relu,
            forward=Spread.of(walls[f"{layer.key} forward"]),
            step=Spread.of(walls[layer.key]),
            ratio=Spread.of(walls[layer.key] / walls[layer.baseline]),
            peak_bytes=_peak_bytes(calls[layer.key], gradients, device),
        )
        for layer in layers
    ]
    return CaseCosts(case, Spread.of(walls[COPY]), costs)


def _layers(case: Case, kernels: list[str], device: torch.device) -> list[_Layer]:
    channels, ranks = case.channels, dist.get_world_size()
    how: dict[str, Any] = {"device": device, "dtype": case.parameters}
    theirs = nn.BatchNorm2d(channels, **how)
    weights = list(theirs.parameters())
    layers = [
        _Layer(BASELINE, 1, False, theirs, weights),
        _Layer(BASELINE, 1, True, lambda x: theirs(x).relu_(), weights),
    ]
    if device.type == "cuda":
        # On CPU it refuses to run.
        torchs = nn.SyncBatchNorm(channels, **how)
        layers.append(_Layer("nn.SyncBatchNorm", ranks, False, torchs, list(torchs.parameters())))
    groups = {1: resolve_group(1), ranks: dist.group.WORLD}
    for kernel in kernels:
        for size, group in groups.items():
            ours = SyncBatchNorm2d(channels, process_group=group, **how)
            ours.sync_kernel = kernel
            fused = partial(_fused, ours, group, kernel)
            weights = list(ours.parameters())
            layers.append(_Layer(kernel, size, False, ours, weights))
            layers.append(_Layer(kernel, size, True, fused, weights))
    return layers


def _fused(
    layer: SyncBatchNorm2d, group: dist.ProcessGroup | None, kernel: str, x: Tensor
) -> Tensor:
    return sync_batch_norm(
        x,
        layer.running_mean,
        layer.running_var,
        layer.weight,
        layer.bias,
        training=True,
        process_group=group,
        activation="relu",
        kernel=kernel,
    )


def _step(layer: _Layer, x: Tensor, gradients: _Gradients) -> None:
    loss = _Given.apply(layer.call(x), gradients)
    torch.autograd.grad(loss, [x, *layer.parameters])


def _peak_bytes(step: Callable[[], object], gradients: _Gradients, device: torch.device) -> int:
    def with_gradient() -> None:
        gradients.refill()
        step()

    return peak_bytes(with_gradient, device) - gradients.dy.nbytes
