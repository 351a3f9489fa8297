from __future__ import annotations

import pytest

from tests.ranks import Pool, Ranks
from tests.transports import TRANSPORTS

# Each transport once, and both numbers of ranks.
JOBS = [(3 if name == "openmpi" else 2, name) for name in TRANSPORTS if name != "mpich"]


@pytest.fixture(params=JOBS, ids=lambda job: f"{job[1]}-{job[0]}")
def job(request: pytest.FixtureRequest, pool: Pool) -> Ranks:
    """Return the ranks of a job; tests of behaviour that depends on the transport use it."""
    return pool(*request.param)


@pytest.fixture
def pair(pool: Pool) -> Ranks:
    """Return two ranks; tests of behaviour above the transport use them."""
    return pool(2, "gloo")
