"""Peak memory of calls, of layers and of fused blocks; percentiles and interleaved timing."""

from __future__ import annotations

import copy
import platform
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm2d, convert_sync_batchnorm, fuse
from syncbn.bench.memory import peak_bytes, reuse_freed_memory
from syncbn.bench.networks import resnet50
from syncbn.bench.timing import Percentiles, interleave
from tests.kernel_cases import needs_cpp

CPU = torch.device("cpu")


@needs_cpp
@pytest.mark.parametrize(("block", "channels"), [("4", 64), ("5", 256)])
def test_fused_block_needs_no_more_memory_than_torch(block: str, channels: int) -> None:
    """Forward and backward of a bottleneck of ResNet-50, with and without a projection."""
    baseline = resnet50().get_submodule(block)
    x = torch.randn(2, channels, 28, 28, requires_grad=True)
    ours = convert_sync_batchnorm(copy.deepcopy(baseline))
    fused = copy.deepcopy(ours)
    assert len(fuse(fused).fused) == 3

    def peak(net: nn.Module) -> int:
        def step() -> None:
            # The gradient of the block is unshared, as in a network.
            (net(x) * 1.0).sum().backward()

        step()  # allocates the gradients of parameters
        return peak_bytes(step, CPU)

    # Per-channel values: statistics in float64, gradients of parameters.
    limit = peak(baseline) + 2**14
    assert peak(ours) <= limit
    # The mask of the last ReLU gives the gradient of the residual, next to dy and dx.
    assert peak(fused) <= limit + baseline(x).nbytes


@needs_cpp
def test_peak_memory_depends_on_the_kernel() -> None:
    x = torch.randn(4, 3, 50, 50, requires_grad=True)
    layer = SyncBatchNorm2d(3)

    def peak(kernel: str) -> float:
        layer.impl = kernel
        return peak_bytes(lambda: (layer(x) * 2).sum().backward(), CPU) / x.nbytes

    peak("cpu")  # allocates the gradients
    # y and 2 y; then the gradients of both, the first of which becomes dx.
    assert 1.9 < peak("cpu") < 2.5
    assert peak("reference") > 3


def test_peak_memory_counts_freed_tensors() -> None:
    def run() -> None:
        first = torch.empty(1000)
        del first
        assert torch.empty(3000) is not torch.empty(2000)

    assert peak_bytes(run, CPU) == 5000 * 4


def _faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(16 << 20).zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _faults_before_and_after() -> tuple[int, bool, int, int]:
    torch.set_num_threads(1)  # a fork has no threads of its parent's OpenMP pool
    return _faults(), reuse_freed_memory(), _faults(), _faults()


def test_malloc_reuses_freed_memory() -> None:
    """In a separate process, since the setting is permanent."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        before, can, _, after = pool.submit(_faults_before_and_after).result()
    assert can == (platform.libc_ver()[0] == "glibc")
    if can:
        assert after < before / 10


def test_percentiles() -> None:
    percentiles = Percentiles.of(torch.arange(101, dtype=torch.float64).flip(0))
    assert (percentiles.low, percentiles.median, percentiles.high) == (10, 50, 90)
    assert percentiles.text() == "50 (10..90)"
    assert percentiles.text(unit=25) == "2.0 (0.4..3.6)"


def test_interleave_shuffles_each_round() -> None:
    """Regression: with many calls, the first few always followed the same calls."""
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "abcd"}
    times = interleave(calls, rounds=30, burst=2, barrier=partial(order.append, "|"))
    turns = "".join(order).split("|")[1:]
    rounds = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert len(rounds) == 2 + 30  # two rounds warm up
    assert all(sorted(turns) == ["aa", "bb", "cc", "dd"] for turns in rounds)
    assert all(len(set(column)) == 4 for column in zip(*rounds, strict=True))
    assert all(len(seconds) == 30 * 2 for seconds in times.values())


def test_interleave_returns_seconds() -> None:
    times = interleave({"sleep": partial(time.sleep, 0.02)}, rounds=2)
    assert times["sleep"].min() >= 0.02
