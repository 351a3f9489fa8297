from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.ranks import Ranks

# Spawned workers and small all-reduces make examples slow to generate, not wrong.
settings.register_profile(
    "syncbn", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("syncbn")


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


@pytest.fixture(params=[2, 3], ids=["two", "three"])
def ranks(request: pytest.FixtureRequest, two_ranks: Ranks, three_ranks: Ranks) -> Ranks:
    return two_ranks if request.param == 2 else three_ranks


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
