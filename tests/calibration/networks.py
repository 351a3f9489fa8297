"""Small networks with batch norm, their data and their statistics."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.calibration.recalibrate import ExactMethod, Method

EXACT: tuple[ExactMethod, ...] = get_args(ExactMethod)
METHODS: tuple[Method, ...] = get_args(Method)
Stats = dict[str, tuple[Tensor, Tensor]]


class Model(nn.Module):
    """Modules by name, and a forward that is a function of the model and a batch."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self._run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self._run(self, x)


class Block(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(x + self.second(self.first(x)))
        return y


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Return a network with five batch-norm layers, three of them torch's, and dropout."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        syncbn.SyncBatchNorm2d(6),
        nn.ReLU(),
        Block(6),
        nn.Dropout(0.5),
        nn.Conv2d(6, 5, 3, stride=2),
        nn.SyncBatchNorm(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
        nn.BatchNorm1d(4),
        nn.Linear(4, 2),
    )
    for layer in layers(net).values():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
        layer.weight.data.uniform_(0.5, 1.5)
        layer.num_batches_tracked.fill_(7)
    return net.to(dtype)


FROZEN = ("1", "3.second.1")


def partly_frozen() -> nn.Sequential:
    """Return the network in training mode, with two layers in evaluation mode."""
    net = network().train()
    for name in FROZEN:
        layers(net)[name].eval()
    return net


def images(number: int = 24, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return images ``[N, 3, 8, 8]`` that differ in brightness and contrast."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(number, 3, 8, 8, generator=generator, dtype=torch.float64)
    contrast = torch.rand(number, 1, 1, 1, generator=generator, dtype=torch.float64) + 0.5
    brightness = torch.randn(number, 3, 1, 1, generator=generator, dtype=torch.float64)
    return (x * contrast + brightness + 3).to(dtype)


def batches(batch_size: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, ...]:
    """Return a rank's share of the images, in batches."""
    return tuple(images()[rank::world_size].split(batch_size))


def labelled(batch_size: int, rank: int = 0, world_size: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Return a rank's share of the images with labels, 0 or 1, in batches."""
    labels = torch.arange(24) % 3 // 2
    mine = labels[rank::world_size].split(batch_size)
    return list(zip(batches(batch_size, rank, world_size), mine, strict=True))


def one_shot() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images with labels, once."""
    yield from labelled(6)


def raise_key_error() -> Iterator[Tensor]:
    """Raise the KeyError of a loader with a wrong key."""
    yield {"picture": images()}["image"]


def run_batch(model: nn.Module, batch: Tensor) -> object:
    """Run a batch; recalibrate does not coalesce batches for another forward than the default."""
    return model(batch)


def interrupt() -> None:
    """Send Ctrl-C to this process."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1e-3)  # Python calls the handler within some instructions


def layers(net: nn.Module) -> dict[str, Any]:
    """Return the batch-norm layers by name."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }


def statistics(net: nn.Module) -> Stats:
    """Return copies of the running mean and variance of every layer."""
    return {
        name: (layer.running_mean.double().clone(), layer.running_var.double().clone())
        for name, layer in layers(net).items()
    }


def distance(ours: Stats, theirs: Stats) -> float:
    """Return the largest difference: of means in standard deviations, of variances relative."""
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, (mean, var) in theirs.items():
        shift = ((ours[name][0] - mean).abs() / var.sqrt()).max().item()
        worst = max(worst, shift, ((ours[name][1] - var).abs() / var).max().item())
    return worst


def require_error(net: nn.Module, message: str, batches: Any, **options: Any) -> None:
    """Require an error of a calibration, after which statistics and modes are unchanged."""
    before, modes = statistics(net), [module.training for module in net.modules()]
    errors = (ValueError, TypeError, LookupError, MemoryError, KeyboardInterrupt)
    with pytest.raises(errors, match=message):
        syncbn.recalibrate(net, batches, **options)
    assert distance(statistics(net), before) == 0.0
    assert [module.training for module in net.modules()] == modes


def compute_population_stats(net: nn.Module, *batches: Tensor) -> Stats:
    """Return the population statistics, set one layer after the other, batch by batch."""
    net.eval()
    for layer in layers(net).values():
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for x in batches:
                net(x)
        handle.remove()
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in seen], 1).double()
        layer.running_mean.copy_(values.mean(1))
        layer.running_var.copy_(values.var(1, correction=1))
    return statistics(net)
