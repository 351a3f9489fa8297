from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from train import fit

import syncbn
from tests.example.support import Train, tiny
from tests.ranks import Pool, Ranks


@pytest.fixture
def alone() -> Iterator[syncbn.RankInfo]:
    yield syncbn.init_process_group()
    dist.destroy_process_group()


@pytest.fixture
def train(alone: syncbn.RankInfo) -> Train:
    return lambda *overrides: fit(tiny(*overrides), alone)


@pytest.fixture
def two_ranks(pool: Pool) -> Ranks:
    """Return two ranks over Gloo only; `test_launch.py` compares the transports."""
    return pool(2, "gloo")
