"""The numbers of the C++ kernels, for each instruction set of this processor."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import Case
from torch import Tensor

from syncbn.kernels import REFERENCE, cpu
from syncbn.kernels.base import NormalizeArgs, RunningStats, Saved
from syncbn.moments import Moments
from tests.kernel_cases import (
    DTYPES,
    EPS,
    backward_elemt,
    backward_reduce,
    compute_all,
    needs_cpp,
    normalize,
    saved_for,
    tolerance,
)
from tests.kernels.test_kernels import LAYOUTS, SHAPES, check_module

pytestmark = needs_cpp

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_float64(kernel: cpu.CPUKernel, dtype: torch.dtype, layout: str) -> None:
    for shape, affine in itertools.product(SHAPES, (True, False)):
        check_module(kernel, Case((shape,), dtype, layout, affine=affine), tolerance(dtype), CPU)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [30.0, 1e4])
def test_keeps_precision_far_from_zero(kernel: cpu.CPUKernel, layout: str, offset: float) -> None:
    for shape in (*SHAPES[-2:], (2, 3, 301, 401), (700, 3), (5, 70, 3)):
        check_module(kernel, Case((shape,), layout=layout, offset=offset), 1e-6, CPU)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_precision_where_the_mean_moves(kernel: cpu.CPUKernel, layout: str) -> None:
    """A pivot from the first values is then repeatedly far from the next values."""
    drift = torch.linspace(0, 1e4, 40 * 90 * 90, dtype=torch.float64)
    noise = torch.randn(40, 3, 90, 90, dtype=torch.float64)
    x = (noise + drift.view(40, 1, 90, 90)).float()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    found = Moments.unpack(kernel.moments(x), 3)
    values = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(found.variance(), values.var(1, correction=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mean(), values.mean(1), rtol=1e-7, atol=0)


@pytest.mark.parametrize("value", [0.1, -7.3, 1e3 + 0.1, 1e6 + 0.3, 1e-30])
def test_a_constant_channel_is_constant(kernel: cpu.CPUKernel, value: float) -> None:
    """Also where a first pivot of few digits, or the rounding of a sum, differs from it."""
    for samples, channels, space in itertools.product(
        (1, 2, 5), (1, 3, 40), (1, 2, 9, 16, 75, 9000)
    ):
        x = torch.full((samples, channels, space), value)
        for message in (kernel.moments(x), kernel.moments(x.double() + value / 3)):
            found = Moments.unpack(message, channels)
            assert not found.variance().any(), (samples, channels, space)


def every_half(dtype: torch.dtype) -> Tensor:
    """Return all numbers of a half type, NaN and infinities included, ``[1, 4096, 4, 4]``."""
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    return bits.view(dtype).view(1, 4096, 4, 4)


def scaling(channels: int, scale: float) -> Saved:
    """Return the transform that multiplies."""
    numbers = torch.zeros(2 * channels + 1, dtype=torch.float64)
    numbers[channels:] = 1
    weight = torch.full((channels,), scale, dtype=torch.float64)
    return Saved(weight, weight, None, numbers, None, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 0.5**7, 1.00390625, 3e4])
@pytest.mark.parametrize("layout", ["rows", "columns", "short rows"])
def test_every_half_is_read_and_rounded_as_by_torch(
    kernel: cpu.CPUKernel, dtype: torch.dtype, scale: float, layout: str
) -> None:
    """Subnormal, tied, overflowing: multiplied in float32 and rounded to nearest, ties to even."""
    x = every_half(dtype)
    match layout:
        case "rows":
            x = x.flatten(2)
        case "columns":
            x = x.contiguous(memory_format=torch.channels_last)
        case _:
            x = x.view(4, 4096, 4)
    # Rows of 16 values fill vectors; one value less leaves a remainder.
    for values in (x, x[..., 1:].contiguous() if layout != "columns" else x[:, :, 1:]):
        found = normalize(kernel, values, scaling(4096, scale))
        wanted = (values.float() * torch.tensor(scale, dtype=torch.float32)).to(dtype)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_propagates_like_torch(kernel: cpu.CPUKernel, layout: str, bad: float) -> None:
    memory_format = getattr(torch, layout.replace("contiguous", "contiguous_format"))
    x = torch.randn(3, 40, 5, 6).contiguous(memory_format=memory_format)
    x[1, 20, 3, 4] = bad
    message = kernel.moments(x)
    mean, var, their_mean, their_var = torch.ones(4, 40)
    running = RunningStats(mean, var, None, 0.1)
    y, _ = kernel.normalize(x, message, NormalizeArgs(EPS, running=running))
    wanted = F.batch_norm(x, their_mean, their_var, training=True)
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(mean.isfinite(), their_mean.isfinite())
    assert torch.equal(var.isfinite(), their_var.isfinite())


def test_subnormal_inputs(kernel: cpu.CPUKernel) -> None:
    x = torch.randn(4, 5, 6, 7, dtype=torch.float64) * 1e-41
    values = x.float().double().movedim(1, 0).flatten(1)
    found = Moments.unpack(kernel.moments(x.float()), 5)
    torch.testing.assert_close(found.sum, values.sum(1), rtol=0, atol=1e-44 * 168)
    assert torch.equal(normalize(kernel, x.float(), scaling(5, 2.0**20)), x.float() * 2.0**20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 20, 7, 7), (3, 20, 2, 2), (2, 3, 70, 70)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_relu_and_residual(
    kernel: cpu.CPUKernel, dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> None:
    memory_format = getattr(torch, layout.replace("contiguous", "contiguous_format"))
    x, dy, residual = (
        torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(3)
    )
    how, exact = saved_for(x, relu=True), saved_for(x.double(), relu=True)
    # At the ReLU threshold rounding decides, and both results are right.
    edge = normalize(REFERENCE, x.double(), exact._replace(relu=False)).abs() < 1e-3
    dy.masked_fill_(edge, 0)
    for a, b in zip(
        compute_all(kernel, x, dy, how),
        compute_all(REFERENCE, x.double(), dy.double(), exact),
        strict=True,
    ):
        assert (a - b).abs().max() <= 2 * tolerance(dtype) * b.abs().max()
    wanted = normalize(REFERENCE, x.double(), exact, residual.double())
    found = normalize(kernel, x, how, residual)
    assert (found - wanted).abs().max() <= 2 * tolerance(dtype) * wanted.abs().max()
    assert (found == 0).any()
    assert (found >= 0).all()


def test_relu_keeps_nan_and_lets_its_gradient_pass(kernel: cpu.CPUKernel) -> None:
    """As torch.relu, and its gradient, do."""
    x = torch.randn(2, 3, 17)
    x[0, 1, 5] = float("nan")
    how = saved_for(torch.randn(2, 3, 17), relu=True)
    assert torch.equal(normalize(kernel, x, how).isnan(), x.isnan())
    dx = backward_elemt(kernel, torch.ones_like(x), x, how, torch.zeros(6, dtype=torch.float64))
    assert torch.equal(dx.isnan(), x.isnan())
    sums = backward_reduce(kernel, torch.ones_like(x), x, how).sums.view(2, -1)
    assert sums[0].isfinite().all()
    assert torch.equal(sums[1].isnan(), torch.tensor([False, True, False]))


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_weight_and_bias_of_any_dtype(
    kernel: cpu.CPUKernel, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x = torch.randn(4, 21, 5)
    how = saved_for(x)
    assert how.weight is not None
    assert how.bias is not None
    weight, bias = how.weight.to(dtypes[0]), how.bias.to(dtypes[1])
    for w, b in itertools.product((weight, weight.repeat(2, 1).t()[:, 0], None), (bias, None)):
        mixed = how._replace(weight=w, bias=b)
        found, wanted = (normalize(k, x, mixed) for k in (kernel, REFERENCE))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


AVERAGES = [(a, b) for a in (*DTYPES, None) for b in (*DTYPES, None)]


@pytest.mark.parametrize("dtypes", AVERAGES, ids=str)
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_running_averages(
    kernel: cpu.CPUKernel,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
    momentum: float | None,
    count: int,
) -> None:
    x = torch.randn(count, 37, dtype=torch.float64)
    message = REFERENCE.moments(x)
    found: list[list[Tensor | None]] = []
    for k in (kernel, REFERENCE):
        generator = torch.Generator().manual_seed(0)
        averages: list[Tensor | None] = [
            None if dtype is None else torch.rand(37, generator=generator).to(dtype)
            for dtype in dtypes
        ]
        averages.append(torch.tensor(4))
        for tracked in (averages[2], None):
            running = RunningStats(averages[0], averages[1], tracked, momentum)
            k.normalize(x, message, NormalizeArgs(EPS, running=running))
            k.forward_local(x, NormalizeArgs(EPS, running=running))
        found.append(averages)
    for mine, other in zip(*found, strict=True):
        if mine is not None:
            # A rounding of float64 may decide a tie.
            torch.testing.assert_close(mine, other)
            assert mine._version > 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.int64], ids=str)
def test_counters_of_any_dtype(kernel: cpu.CPUKernel, dtype: torch.dtype) -> None:
    """Of 32 bits, they once had their neighbours overwritten."""
    counters = torch.tensor([-1, 7, -1], dtype=dtype)
    x = torch.randn(5, 3)
    running = RunningStats(torch.zeros(3), torch.ones(3), counters[1], 0.1)
    kernel.normalize(x, kernel.moments(x), NormalizeArgs(EPS, running=running))
    assert counters.tolist() == [-1, 8, -1]


def test_a_momentum_that_is_not_a_number_is_none(kernel: cpu.CPUKernel) -> None:
    x, mean = torch.randn(5, 3), torch.zeros(3)
    running = RunningStats(mean, None, torch.tensor(0), float("nan"))
    kernel.normalize(x, kernel.moments(x), NormalizeArgs(EPS, running=running))
    assert mean.isnan().all()


def test_numbers_that_are_negated_yet(kernel: cpu.CPUKernel) -> None:
    """A view with a bit that says so: its memory has the other sign."""
    x = torch.randn(4, 3, 5)
    message = REFERENCE.moments(x)
    found = []
    for k in (kernel, REFERENCE):
        weight, mean = (torch._neg_view(torch.full((3,), -2.0)) for _ in range(2))
        running = RunningStats(mean, None, None, 0.1)
        y, _ = k.normalize(x, message, NormalizeArgs(EPS, weight, weight, running=running))
        found.append((y, mean))
    torch.testing.assert_close(*found)


def test_a_layer_that_evaluated_and_then_trained_tells_autograd() -> None:
    """The running variance, which the gradient still needs, is not the one it was."""
    import syncbn

    layer = syncbn.SyncBatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = layer.eval()(x)
    layer.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
