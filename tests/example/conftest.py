from __future__ import annotations

from collections.abc import Iterator

import pytest

import syncbn
from tests.example.support import group_of_one


@pytest.fixture
def alone() -> Iterator[syncbn.RankInfo]:
    with group_of_one() as info:
        yield info
