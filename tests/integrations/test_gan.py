"""A GAN: two forwards of the discriminator before one backward, under DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from tests.device import seeded
from tests.integrations.forked import SIZE, run_on_two_ranks
from tests.integrations.support import BOUND, LEARNING_RATE, initialize, largest_difference, state

STEPS, SAMPLES = 3, 8


def make_generator() -> nn.Module:
    layers = (
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 12),
        nn.Unflatten(1, (3, 4)),
    )
    return nn.Sequential(*layers)


def make_discriminator() -> nn.Module:
    layers = nn.Conv1d(3, 5, 2), nn.BatchNorm1d(5), nn.LeakyReLU(), nn.Flatten(), nn.Linear(15, 1)
    return nn.Sequential(*layers)


def train(generator: nn.Module, discriminator: nn.Module, rank: int, size: int) -> list[float]:
    """Train both networks on this rank's part of the batches and return the losses."""
    networks = generator, discriminator
    optimizers = [torch.optim.SGD(net.parameters(), LEARNING_RATE) for net in networks]
    random = seeded(0)
    losses = []
    for _ in range(STEPS):
        noise = torch.randn(SAMPLES, 4, generator=random, dtype=torch.float64)
        real = torch.randn(SAMPLES, 3, 4, generator=random, dtype=torch.float64).exp()
        noise, real = noise.chunk(size)[rank], real.chunk(size)[rank]
        fake = generator(noise)
        loss = hinge(discriminator(real)) + hinge(-discriminator(fake.detach()))
        step(optimizers[1], loss)
        losses.append(loss.item())
        loss = -discriminator(fake).mean()
        step(optimizers[0], loss)
        losses.append(loss.item())
    return losses


def hinge(logits: Tensor) -> Tensor:
    return F.relu(1 - logits).mean()


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _train(rank: int) -> Any:
    plain = [initialize(make) for make in (make_generator, make_discriminator)]
    models = [
        DistributedDataParallel(syncbn.convert_sync_batchnorm(net), broadcast_buffers=True)
        for net in plain
    ]
    return train(models[0], models[1], rank, SIZE), [state(net) for net in plain]


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """``nn.SyncBatchNorm`` raises an error there: DDP writes buffers saved for the backward."""
    answers = run_on_two_ranks(_train, tmp_path)
    networks = [initialize(make) for make in (make_generator, make_discriminator)]
    losses = train(networks[0], networks[1], 0, 1)
    means = [sum(parts) / SIZE for parts in zip(*(own for own, _ in answers), strict=True)]
    torch.testing.assert_close(means, losses, rtol=0, atol=BOUND)
    for _, states in answers:
        for actual, net in zip(states, networks, strict=True):
            assert largest_difference(actual, state(net)) < BOUND
