"""Forward and backward of layers, in turns: torch's and ours, alone and synchronized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.bench.launches import Launches, count
from syncbn.bench.layer_cases import ADDITION, NOTHING, RELU, Case
from syncbn.bench.memory import peak_bytes
from syncbn.bench.mpirun import slowest
from syncbn.bench.timing import Spread, clock_of, take_turns
from syncbn.bench.torchs import Synchronized
from syncbn.distributed.groups import resolve_group
from syncbn.nn.module import SyncBatchNorm2d
from syncbn.ops.functional import sync_batch_norm

BASELINE, SYNCHRONIZED, COPY = "nn.BatchNorm2d", "nn.SyncBatchNorm", "copy"


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs; seconds on the slowest rank.

    Attributes:
        name: of the layer or kernel.
        ranks: whose batches are one.
        after: what follows, of :data:`NOTHING`, :data:`RELU` and :data:`ADDITION` of a residual.
        forward: seconds.
        step: seconds of forward and backward.
        ratio: of steps, to that of nn.BatchNorm2d (with the same after it) in the same round.
        peak_bytes: of the tensors of a step at once, without inputs and output gradient.
    """

    name: str
    ranks: int
    after: str
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
    after: str
    call: Callable[[Tensor, Tensor], Tensor]
    parameters: list[nn.Parameter]

    @property
    def key(self) -> str:
        return f"{self.name} {self.ranks} {self.after}"

    @property
    def baseline(self) -> str:
        return f"{BASELINE} 1 {self.after}"

    def step(self, x: Tensor, residual: Tensor, gradients: _Gradients) -> None:
        """Run forward and backward."""
        loss = _Given.apply(self.call(x, residual), gradients)
        inputs = [x, residual] if self.after == ADDITION else [x]
        torch.autograd.grad(loss, [*inputs, *self.parameters])


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
    x, residual, dy = (case.tensor(device) for _ in range(3))
    x.requires_grad_()
    residual.requires_grad_()
    layers = _layers(case, kernels, device)
    target, gradients = torch.empty_like(dy), _Gradients(dy)
    calls: dict[str, Callable[[], object]] = {COPY: partial(target.copy_, dy)}
    for layer in layers:
        calls[f"{layer.key} forward"] = partial(layer.call, x, residual)
        calls[layer.key] = partial(layer.step, x, residual, gradients)

    def before() -> None:
        gradients.refill()
        meet()

    times = take_turns(calls, rounds, meet=before, clock=clock_of(device))
    walls = {name: slowest(taken.wall) for name, taken in times.items()}
    costs = [
        LayerCost(
            layer.name,
            layer.ranks,
            layer.after,
            forward=Spread.of(walls[f"{layer.key} forward"]),
            step=Spread.of(walls[layer.key]),
            ratio=Spread.of(walls[layer.key] / walls[layer.baseline]),
            peak_bytes=_peak_bytes(calls[layer.key], gradients, device),
        )
        for layer in layers
    ]
    return CaseCosts(case, Spread.of(walls[COPY]), costs)


def launched(case: Case, kernels: list[str], device: torch.device) -> list[Launches]:
    """Return what layers launch on a GPU, but for those that talk to other ranks."""
    x, residual, dy = (case.tensor(device) for _ in range(3))
    x.requires_grad_()
    return [
        count(
            f"{layer.name} + {layer.after}" if layer.after else layer.name,
            partial(layer.call, x, residual),
            dy,
            [x, *layer.parameters],
        )
        for layer in _layers(case, kernels, device)
        if layer.ranks == 1
    ]


def _layers(case: Case, kernels: list[str], device: torch.device) -> list[_Layer]:
    channels, ranks = case.channels, dist.get_world_size()
    how: dict[str, Any] = {"device": device, "dtype": case.parameters}
    theirs = nn.BatchNorm2d(channels, **how)
    weights = list(theirs.parameters())
    layers = [
        _Layer(BASELINE, 1, NOTHING, lambda x, _: theirs(x), weights),
        _Layer(BASELINE, 1, RELU, lambda x, _: theirs(x).relu_(), weights),
        _Layer(BASELINE, 1, ADDITION, lambda x, r: theirs(x).add_(r).relu_(), weights),
    ]
    if device.type == "cuda":
        # On CPU it refuses to run.
        torchs = Synchronized(channels, **how)
        weights = list(torchs.parameters())
        layers.append(_Layer(SYNCHRONIZED, ranks, NOTHING, lambda x, _: torchs(x), weights))
    groups = {1: resolve_group(1), ranks: dist.group.WORLD}
    for kernel, (size, group) in product(kernels, groups.items()):
        ours = SyncBatchNorm2d(channels, process_group=group, **how)
        ours.impl = kernel
        weights = list(ours.parameters())
        layers += [
            _Layer(kernel, size, after, partial(_ours, ours, group, kernel, after), weights)
            for after in (NOTHING, RELU, ADDITION)
        ]
    return layers


def _ours(
    layer: SyncBatchNorm2d,
    group: dist.ProcessGroup | None,
    kernel: str,
    after: str,
    x: Tensor,
    residual: Tensor,
) -> Tensor:
    if after == NOTHING:
        y: Tensor = layer(x)
        return y
    return sync_batch_norm(
        x,
        layer.running_mean,
        layer.running_var,
        layer.weight,
        layer.bias,
        training=True,
        process_group=group,
        residual=residual if after == ADDITION else None,
        activation="relu",
        impl=kernel,
    )


def _peak_bytes(step: Callable[[], object], gradients: _Gradients, device: torch.device) -> int:
    def with_gradient() -> None:
        gradients.refill()
        step()

    return peak_bytes(with_gradient, device) - gradients.dy.nbytes
