"""Which tests run after each other, where several processes run tests."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

# Ranks that poll for each other are slow where others want the cores: one such job at a time.
_POLLING = {
    "tests/bench/test_collectives.py",
    "tests/cli/test_bench.py",
    "tests/cli/test_doctor.py",
    "tests/example/test_mpirun.py",
    "tests/test_asynchronous.py",
    "tests/test_conformance.py",
    "tests/test_ecosystem_groups.py",
    "tests/test_environment.py",
    "tests/test_mpi_faults.py",
    "tests/test_mpi_patience.py",
}


class FileByFile(LoadScopeScheduling):  # type: ignore[misc]
    """The tests of a file share what they have started, and so do all those that run under MPI."""

    def _split_scope(self, nodeid: str) -> str:
        return _unit(nodeid)


def longest_first(items: list[pytest.Item]) -> None:
    """Begin with what takes one process longest, so that none is left alone with it."""
    items.sort(key=lambda item: _unit(item.nodeid) != "MPI")


def _unit(nodeid: str) -> str:
    file = nodeid.split("::", 1)[0]
    return "MPI" if file in _POLLING else file
