from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from syncbn.kernels import IMPLS, cpu
from tests import device
from tests.kernel_cases import cpp, levels
from tests.mpi_jobs import Launch
from tests.ranks import Pool, Ranks
from tests.scheduling import FileByFile, longest_first
from tests.transports import MPIS, SUITE, TRANSPORTS

# Spawned workers and small all-reduces make examples slow to generate, not wrong.
settings.register_profile(
    "syncbn", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("syncbn")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--impl", default="auto", choices=IMPLS, help='kernel of layers with impl="auto"'
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "layers: runs again with --impl triton (make test-triton)")
    device.use_impl(config.getoption("impl"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileByFile:
    return FileByFile(config, log)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Return the ranks of a size and transport, the same for all tests."""
    pools: dict[tuple[int, str], Ranks] = {}

    def get(size: int, transport: str) -> Ranks:
        if transport == "nccl" and size > torch.cuda.device_count():
            pytest.skip(f"needs {size} GPUs")
        return pools.setdefault((size, transport), Ranks(size, transport))

    yield get
    for ranks in pools.values():
        ranks.close()


@pytest.fixture(scope="session", params=[name for name in TRANSPORTS if name != "mpich"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def two_ranks(pool: Pool, transport: str) -> Ranks:
    return pool(2, transport)


@pytest.fixture
def three_ranks(pool: Pool, transport: str) -> Ranks:
    return pool(3, transport)


@pytest.fixture(params=[2, 3], ids=["two", "three"])
def ranks(request: pytest.FixtureRequest, pool: Pool, transport: str) -> Ranks:
    return pool(request.param, transport)


@pytest.fixture(params=SUITE)
def three_cpu_ranks(request: pytest.FixtureRequest, pool: Pool) -> Ranks:
    return pool(3, request.param)


@pytest.fixture(params=MPIS)
def three_mpi_ranks(request: pytest.FixtureRequest, pool: Pool) -> Ranks:
    return pool(3, request.param)


@pytest.fixture(params=[pytest.param(i, id=name) for i, name in enumerate(cpu.LEVELS)])
def kernel(request: pytest.FixtureRequest) -> cpu.CPUKernel:
    """Return the C++ kernels for one instruction set."""
    level: int = request.param
    if level > cpp().level:
        pytest.skip(f"this processor has no {cpu.LEVELS[level]}")
    return levels()[level]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(tmp_path)
    yield launch
    launch.close()
