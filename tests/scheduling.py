"""Distribution of tests among pytest-xdist workers."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

# Polling ranks are slow on busy cores, so one worker runs these files and starts their pools.
_POLLING = {
    "tests/distributed/test_initialization.py",
    "tests/example/test_launch.py",
    "tests/bench/test_benchmarks.py",
    "tests/cli/test_doctor.py",
    "tests/test_ecosystem.py",
    "tests/test_ecosystem_groups.py",
}


class FileByFile(LoadScopeScheduling):  # type: ignore[misc]
    """One worker per file, since the tests of a file share ranks; one worker for all MPI tests."""

    def _split_scope(self, nodeid: str) -> str:
        return _unit(nodeid)


def longest_first(items: list[pytest.Item]) -> None:
    """Start with the MPI tests, which take one worker longest."""
    items.sort(key=lambda item: _unit(item.nodeid) != "MPI")


def _unit(nodeid: str) -> str:
    file = nodeid.split("::", 1)[0]
    if file.startswith("tests/integrations/"):
        return "integrations"  # one worker imports the trainers
    return "MPI" if file in _POLLING or file.startswith(("tests/mpi/", "tests/cluster/")) else file
