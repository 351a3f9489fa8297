"""Values of the C++ kernels, for each instruction set of this processor."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import syncbn
from syncbn.kernels import REFERENCE, cpu
from syncbn.kernels.base import NormalizeArgs, RunningStats, Saved
from syncbn.moments import Moments
from tests.kernel_cases import (
    DTYPES,
    EPS,
    needs_cpp,
    normalize,
    saved_for,
)

pytestmark = needs_cpp

FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_keeps_precision_where_the_mean_moves(
    kernel: cpu.CPUKernel, memory_format: torch.memory_format
) -> None:
    """A pivot from the first values is then repeatedly far from the next values."""
    drift = torch.linspace(0, 1e4, 40 * 90 * 90, dtype=torch.float64)
    noise = torch.randn(40, 3, 90, 90, dtype=torch.float64)
    x = (noise + drift.view(40, 1, 90, 90)).float().contiguous(memory_format=memory_format)
    moments = Moments.unpack(kernel.moments(x), 3)
    values = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(moments.variance(), values.var(1, correction=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.mean(), values.mean(1), rtol=1e-7, atol=0)


def every_half(dtype: torch.dtype) -> Tensor:
    """Return all values of a half type, NaN and infinities included, ``[1, 4096, 4, 4]``."""
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    return bits.view(dtype).view(1, 4096, 4, 4)


def scaling(channels: int, scale: float) -> Saved:
    """Return saved values with which an output is the input times a scale."""
    statistics = torch.zeros(2 * channels + 1, dtype=torch.float64)
    statistics[channels:] = 1
    weight = torch.full((channels,), scale, dtype=torch.float64)
    return Saved(weight, weight, None, statistics, None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_is_read_and_rounded_as_by_torch(
    kernel: cpu.CPUKernel, dtype: torch.dtype
) -> None:
    """Subnormal, tied, overflowing: multiplied in float32 and rounded to nearest, ties to even."""
    x = every_half(dtype)
    columns = x.contiguous(memory_format=torch.channels_last)
    # Planes of 16 values fill vectors; one value less leaves a remainder.
    layouts = x.flatten(2), x[..., 1:].contiguous(), columns, columns[:, :, 1:], x.view(4, 4096, 4)
    for scale, values in itertools.product((1.0, 1 / 3, 0.5**7, 1.00390625, 3e4), layouts):
        actual = normalize(kernel, values, scaling(4096, scale))
        expected = (values.float() * torch.tensor(scale, dtype=torch.float32)).to(dtype)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_subnormal_inputs(kernel: cpu.CPUKernel) -> None:
    x = torch.randn(4, 5, 6, 7, dtype=torch.float64) * 1e-41
    values = x.float().double().movedim(1, 0).flatten(1)
    moments = Moments.unpack(kernel.moments(x.float()), 5)
    torch.testing.assert_close(moments.sum, values.sum(1), rtol=0, atol=1e-44 * 168)
    assert torch.equal(normalize(kernel, x.float(), scaling(5, 2.0**20)), x.float() * 2.0**20)


def test_weight_and_bias_of_any_dtype(kernel: cpu.CPUKernel) -> None:
    x = torch.randn(4, 21, 5)
    saved = saved_for(x)
    assert saved.weight is not None
    assert saved.bias is not None
    for dtypes in itertools.product(DTYPES, DTYPES):
        weight, bias = saved.weight.to(dtypes[0]), saved.bias.to(dtypes[1])
        strided = weight.repeat(2, 1).t()[:, 0]
        for w, b in itertools.product((weight, strided, None), (bias, None)):
            mixed = saved._replace(weight=w, bias=b)
            actual, expected = (normalize(k, x, mixed) for k in (kernel, REFERENCE))
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.int64], ids=str)
def test_counters_of_any_dtype(kernel: cpu.CPUKernel, dtype: torch.dtype) -> None:
    """Regression: the neighbours of a 32-bit counter were overwritten."""
    counters = torch.tensor([-1, 7, -1], dtype=dtype)
    x = torch.randn(5, 3)
    running = RunningStats(torch.zeros(3), torch.ones(3), counters[1], 0.1)
    kernel.normalize(x, kernel.moments(x), NormalizeArgs(EPS, running=running))
    assert counters.tolist() == [-1, 8, -1]


def test_nan_momentum_is_not_the_cumulative_average(kernel: cpu.CPUKernel) -> None:
    """NaN stands for None in the library."""
    x, mean = torch.randn(5, 3), torch.zeros(3)
    running = RunningStats(mean, None, torch.tensor(0), float("nan"))
    kernel.normalize(x, kernel.moments(x), NormalizeArgs(EPS, running=running))
    assert mean.isnan().all()


def test_negated_views(kernel: cpu.CPUKernel) -> None:
    """The memory of a view with a negative bit has the other sign."""
    x = torch.randn(4, 3, 5)
    moments = REFERENCE.moments(x)
    results = []
    for k in (kernel, REFERENCE):
        weight, mean = (torch._neg_view(torch.full((3,), -2.0)) for _ in range(2))
        running = RunningStats(mean, None, None, 0.1)
        y, _ = k.normalize(x, moments, NormalizeArgs(EPS, weight, weight, running=running))
        results.append((y, mean))
    torch.testing.assert_close(*results)


def test_autograd_notices_an_update_of_running_statistics() -> None:
    """The gradient of an evaluation needs the running variance, which training then changes."""
    layer = syncbn.SyncBatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = layer.eval()(x)
    layer.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
