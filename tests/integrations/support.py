"""Networks, data, and training in one process without a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.device import seeded

#: Samples of one rank in a step, of two ranks, and of all steps.
BATCH, GLOBAL_BATCH, SAMPLES = 4, 8, 24
CLASSES = 3
LEARNING_RATE = 0.1
BOUND = 1e-10


class PointNet(nn.Module):
    """A network of point clouds, shape [N, 3, points]."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm1d
        self.points = nn.Sequential(
            *(nn.Conv1d(3, 8, 1), norm(8), nn.ReLU(), nn.Conv1d(8, 16, 1), norm(16), nn.ReLU())
        )
        self.head = nn.Sequential(nn.Linear(16, 8), norm(8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.points(x).amax(-1))
        return y


def make_dataset(*shape: int) -> TensorDataset:
    """Return inputs of a shape, with labels."""
    generator = seeded(0)
    x = torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, CLASSES, (SAMPLES,), generator=generator))


def initialize(make: Callable[[], Any]) -> Any:
    """Return a network, the same in every call, in float64."""
    torch.manual_seed(0)
    return make().double()


def train_whole(
    net: nn.Module,
    data: TensorDataset,
    after_step: Callable[[], object] = lambda: None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """Train one epoch on global batches, in order, and return the losses."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), LEARNING_RATE)
    losses = []
    for x, labels in zip(*(t.split(GLOBAL_BATCH) for t in data.tensors), strict=True):
        loss = F.cross_entropy(logits_of(net(x)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after_step()
    return losses


def logits_of(output: Any) -> Tensor:
    """Return the logits of a network, also of a model of transformers."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


def calibrate(net: nn.Module, x: Tensor) -> None:
    """Set the population statistics of all samples, one layer after the other."""
    net.eval()
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            momentum, layer.momentum = layer.momentum, 1.0
            layer.train()
            net(x)
            layer.eval().momentum = momentum


def state(net: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max((actual[name] - expected[name]).abs().max().item() for name in expected)


def check_training(
    answers: Sequence[tuple[list[float], dict[str, Tensor]]],
    make: Callable[[], Any],
    data: TensorDataset,
) -> None:
    """Compare losses, averaged over ranks, and final states with one process's."""
    net = initialize(make)
    losses = train_whole(net, data)
    torch.testing.assert_close(mean_losses(answers), losses, rtol=0, atol=BOUND)
    for _, final in answers:
        assert largest_difference(final, state(net)) < BOUND


def mean_losses(answers: Sequence[Any]) -> list[float]:
    """Return the mean over ranks of each step's loss, from answers that begin with the losses."""
    return [sum(step) / len(step) for step in zip(*(answer[0] for answer in answers), strict=True)]
