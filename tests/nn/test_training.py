"""DDP training with the layer is single-process training with nn.BatchNorm2d on the big batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from tests.device import seeded
from tests.ranks import Ranks

pytestmark = pytest.mark.layers

STEPS = 12
# Samples per rank and step. Equal on all ranks, as DDP averages gradients. Eight, because with
# four values per channel float32 training is chaotic: nn.BatchNorm2d itself drifts by 5e-5.
SAMPLES = 8


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 5),
    ).to(dtype)


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for x, target in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()


def big_batches(dtype: torch.dtype, size: int) -> list[tuple[Tensor, Tensor]]:
    generator = seeded(1)
    return [
        (
            torch.randn(size * SAMPLES, 3, 9, 9, generator=generator, dtype=torch.float64).to(
                dtype
            ),
            torch.randint(5, (size * SAMPLES,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def _train_ranks(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(network(dtype)))
    part = slice(rank * SAMPLES, (rank + 1) * SAMPLES)
    train(model, [(x[part], target[part]) for x, target in big_batches(dtype, 2)])
    state: dict[str, Tensor] = model.module.state_dict()
    return state


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_ddp_equals_one_process_at_the_big_batch(
    two_ranks: Ranks, dtype: torch.dtype, bound: float
) -> None:
    single = network(dtype)
    train(single, big_batches(dtype, 2))
    for state in two_ranks.run(_train_ranks, dtype):
        torch.testing.assert_close(state, dict(single.state_dict()), rtol=0, atol=bound)
