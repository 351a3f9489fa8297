"""Each kernel against formulas in float64 on one process: layouts, sizes, adversarial values."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import Case, batch, parameters
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn import kernels
from syncbn.kernels import REFERENCE, Kernel, cpu
from syncbn.kernels.aten_cuda import AtenCudaKernel
from syncbn.kernels.base import NormalizeArgs, RunningStats, Saved
from syncbn.moments import Moments
from tests.kernel_cases import EPS, RELU, backward_elemt, device_of, dtypes_of, normalize, tolerance

LAYOUTS = ["contiguous", "channels_last", "strided"]
SHAPES = [(4, 3), (1, 5, 7), (3, 1, 6, 5), (2, 17, 1, 1), (2, 7, 3, 4, 5), (3, 24, 28, 28)]
MASK = (True, True, True, False)


def check_close(actual: Tensor, expected: Tensor, bound: float, largest_term: Tensor) -> None:
    """Compare by the largest error over the largest of the terms that are added up."""
    assert actual.shape == expected.shape
    error = (actual.cpu().double() - expected).abs().max()
    assert error <= bound * largest_term, f"{error} over {largest_term}"


def check(kernel: Kernel, case: Case, bound: float) -> None:
    """Compare the methods of a kernel with float64 formulas on the same values."""
    device = device_of(kernel)
    x, dy = (t.to(device) for t in batch(case, 0))
    weight, bias = parameters(case)

    values = x.cpu().double().movedim(1, 0).reshape(case.channels, -1)
    gradients = dy.cpu().double().movedim(1, 0).reshape(case.channels, -1)
    mean, var = values.mean(1), values.var(1, correction=0)
    invstd = (var + EPS).rsqrt()
    xhat = (values - mean[:, None]) * invstd[:, None]
    scale = torch.ones_like(mean) if weight is None else weight.double()
    y = xhat * scale[:, None] + (0 if bias is None else bias.double()[:, None])

    def restore(rows: Tensor) -> Tensor:
        return rows.reshape(x.shape[1], x.shape[0], *x.shape[2:]).movedim(0, 1)

    moments = Moments.unpack(kernel.moments(x).cpu(), case.channels)
    assert moments.count == values.shape[1]
    std = var.sqrt().clamp(min=1e-30)
    # Raw float64 sums of one part add 1e-16 (mean/std)^2.
    raw = 0.0 if case.dtype == torch.float64 else 1e-15
    allowed = min(bound, 1e-6) + raw * (mean / std).square().max()
    if var.min() > 1e-4 * var.max():
        assert ((moments.mean() - mean) / std).abs().max() <= allowed
        assert ((moments.variance() - var) / var).abs().max() <= allowed

    weight, bias = (None if t is None else t.to(device) for t in (weight, bias))
    count = torch.tensor([float(values.shape[1])], dtype=torch.float64)
    statistics = torch.cat([mean, invstd, count]).to(device)
    saved = Saved(x, weight, bias, statistics, None, None)
    result = normalize(kernel, x, saved)
    assert result.dtype == x.dtype
    if case.layout != "strided":
        assert result.stride() == x.stride()
    # The moments add it here, too, where two values per channel may have hardly any variance.
    passed = bound + raw * (mean * invstd).square().max().item()
    check_close(result, restore(y), passed, y.abs().max().clamp(min=1e-9))

    sums = torch.cat([gradients.sum(1), (gradients * xhat).sum(1)])
    reduced = kernel.backward_reduce(dy, saved, MASK)
    # A sum may cancel: its rounding depends on the terms, not on the result.
    terms = torch.cat([gradients.abs().sum(1), (gradients * xhat).abs().sum(1)])
    assert ((reduced.sums.cpu() - sums).abs() <= 1e-6 * terms.clamp(min=1e-9)).all()

    mean_dy, mean_dy_xhat = (sums / count).view(2, -1, 1)
    expected_dx = (gradients - mean_dy - xhat * mean_dy_xhat) * (invstd * scale)[:, None]
    dx = backward_elemt(kernel, dy, x, saved, sums.to(device))
    assert dx.dtype == x.dtype
    # With two values a channel dx is a difference that all but vanishes.
    largest_term = (gradients * (invstd * scale)[:, None]).abs().max()
    check_close(dx, restore(expected_dx), bound, largest_term)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_float64(any_kernel: Kernel, layout: str) -> None:
    for dtype in dtypes_of(any_kernel):
        for shape in SHAPES:
            check(any_kernel, Case((shape,), dtype, layout), tolerance(dtype))
        check(any_kernel, Case((SHAPES[-1],), dtype, layout, affine=False), tolerance(dtype))


# Mean over standard deviation; a float32 mean is off by 6e-4 standard deviations at 1e4.
OFFSETS = (1.0, 2.0, 4.0, 9.0, 1e4)
FAR = [*(((37, 5, 5, 5), offset) for offset in OFFSETS), ((3, 4, 25, 25), 1e4), (SHAPES[-1], 1e4)]
# Runs longer than a block, and a last block that is not full.
FAR += [((2, 3, 301, 401), 3.0), ((700, 3), 1e4), ((5, 70, 3), 1e4)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_precision(any_kernel: Kernel, layout: str) -> None:
    for shape, offset in FAR:
        check(any_kernel, Case((shape,), layout=layout, offset=offset), 1e-6)
    # Variance 1e-10, far below eps: lost when it travels as 1/sqrt(var + eps).
    for shape in SHAPES[-2:]:
        check(any_kernel, Case((shape,), layout=layout, scale=1e-5), 1e-6)


def test_keeps_precision_of_two_values(any_kernel: Kernel) -> None:
    """Regression: Triton summed around zero up to a mean of four standard deviations."""
    means = torch.linspace(0, 6, 4096, dtype=torch.float64)
    x = (means + torch.tensor([[1.0], [-1.0]])).mul(torch.rand(4096) + 0.5).float()
    var = x.double().var(0, correction=0)
    for values in (x, x[..., None]):
        moments = any_kernel.moments(values.to(device_of(any_kernel))).cpu()
        assert ((Moments.unpack(moments, 4096).variance() - var) / var).abs().max() <= 1e-6


def test_precision_does_not_depend_on_the_place_of_an_outlier(any_kernel: Kernel) -> None:
    """Sums around the first value would be raw sums here: it is padding."""
    x = torch.randn(4, 8, 40, 40, dtype=torch.float64).add(1e3).float()
    x[0, :, 0, 0] = 0
    moments = Moments.unpack(any_kernel.moments(x.to(device_of(any_kernel))).cpu(), 8)
    values = x.double().movedim(1, 0).reshape(8, -1)
    var = values.var(1, correction=0)
    torch.testing.assert_close(moments.variance(), var, rtol=1e-6, atol=0)
    assert ((moments.mean() - values.mean(1)) / var.sqrt()).abs().max() <= 1e-6


def test_a_constant_channel_has_no_variance(any_kernel: Kernel) -> None:
    """Raw sums leave 1e-16 v^2, which for v = 1e6 is far above eps.

    A first pivot of few digits, or the rounding of a sum, may differ from the value.
    """
    constants = itertools.cycle([1e6 + 0.3, 0.1, -7.3, 1e3 + 0.1, 1e-30])
    shapes = [*itertools.product((1, 5), (1, 40), (1, 2, 9, 16, 75)), (5, 2, 9000)]
    for shape, dtype in itertools.product(shapes, {F32, dtypes_of(any_kernel)[0]}):
        values_of_channels = torch.tensor([next(constants) for _ in range(shape[1])], dtype=dtype)
        x = values_of_channels.to(device_of(any_kernel))[:, None].expand(shape).contiguous()
        for values in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
            moments = any_kernel.moments(values)
            assert not Moments.unpack(moments, shape[1]).variance().any(), shape
            _, saved = any_kernel.normalize(values, moments, NormalizeArgs(EPS))
            invstd = torch.full((shape[1],), EPS**-0.5).double()
            torch.testing.assert_close(saved.statistics[shape[1] : -1].cpu(), invstd)


F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
PARAMETER_DTYPES: list[tuple[torch.dtype | None, torch.dtype | None]] = [
    *((F64, F64), (F32, F32), (F16, F16), (BF16, BF16), (F32, BF16), (F16, F64)),
    *((None, F32), (BF16, None), (None, None)),
]


def test_parameter_gradients(any_kernel: Kernel) -> None:
    device = device_of(any_kernel)
    for channels, dtypes in itertools.product((1, 2, 7, 8, 17, 33), PARAMETER_DTYPES):
        x, dy = torch.randn(2, 5, channels, 3, device=device)
        statistics = torch.cat([torch.randn(channels), torch.rand(channels + 1)]).double()
        weight, bias = (
            None if dtype is None else torch.rand(channels, dtype=dtype, device=device)
            for dtype in dtypes
        )
        saved = Saved(x, weight, bias, statistics.to(device), None, None)
        reduced = any_kernel.backward_reduce(dy, saved, MASK)
        sums = reduced.sums
        local = any_kernel.backward_local(dy, saved, MASK)[1:3]
        for dweight, dbias in (reduced[1:3], local):
            for gradient, part, like in ((dweight, sums[channels:], weight), (dbias, sums, bias)):
                if like is None or gradient is None:
                    assert gradient is like
                else:
                    assert torch.equal(gradient, part[:channels].to(like.dtype))
                    assert gradient._base is None
        reduced = any_kernel.backward_reduce(dy, saved, (True, False, False, False))
        assert reduced[1:4] == (None,) * 3


def test_running_statistics(any_kernel: Kernel) -> None:
    """700 channels: a kernel has several blocks of them, and only one counts the batch."""
    device, kind = device_of(any_kernel), dtypes_of(any_kernel)[0]
    values = torch.linspace(-1, 1, 700, dtype=F64, device=device)
    # Four and nine are coprime: momenta meet every pair of dtypes.
    momenta = itertools.cycle([0.3, 1.0, None, 0.3])
    for samples, dtypes in itertools.product((0, 1, 5), PARAMETER_DTYPES):
        momentum = next(momenta)
        x = torch.randn(samples, 700, dtype=kind, device=device)
        moments, results = any_kernel.moments(x), []
        for kernel in (any_kernel, REFERENCE):
            mean, var = (
                None if dtype is None else start.to(dtype, copy=True)
                for start, dtype in zip((values, values.exp()), dtypes, strict=True)
            )
            counter = torch.tensor(3, device=device)
            for tracked in (counter, None):
                args = NormalizeArgs(EPS, running=RunningStats(mean, var, tracked, momentum))
                kernel.normalize(x, moments, args)
                if kernel is any_kernel:
                    kernel.forward_local(x, args)
                else:
                    kernel.normalize(x, moments, args)
            tensors = [t for t in (mean, var, counter) if t is not None]
            assert all(t._version > 0 for t in tensors)
            results.append(tensors)
        # A rounding of float64 may decide a tie.
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty_input(any_kernel: Kernel, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=device_of(any_kernel))
    zeros = torch.zeros(7, dtype=torch.float64, device=x.device)
    saved, sums = Saved(x, None, None, zeros, None, None), zeros[:6]
    assert torch.equal(any_kernel.moments(x), zeros)
    y, _ = any_kernel.normalize(x, zeros, NormalizeArgs(EPS))
    assert y.shape == shape
    reduced = any_kernel.backward_reduce(x, saved, MASK)
    assert torch.equal(reduced.sums, sums)
    assert any_kernel.backward_elemt(saved, reduced, sums).shape == shape


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20])
def test_nonfinite_propagates_as_in_torch(
    any_kernel: Kernel, value: float, memory_format: torch.memory_format
) -> None:
    """A step that diverged left averages as if there had been no variance."""
    x = torch.randn(3, 40, 5, 6)
    if value == 1e20:  # a variance beyond float32
        x[:, 20] *= value
    else:
        x[1, 20, 3, 4] = value
    expected_stats = torch.ones(2, 40)
    expected = F.batch_norm(x, expected_stats[0], expected_stats[1], training=True)
    x = x.to(device_of(any_kernel)).contiguous(memory_format=memory_format)
    stats = torch.ones(2, 40, device=x.device)
    running = RunningStats(stats[0], stats[1], None, 0.1)
    y, _ = any_kernel.normalize(x, any_kernel.moments(x), NormalizeArgs(EPS, running=running))
    assert torch.equal(stats.isfinite().cpu(), expected_stats.isfinite())
    # Torch keeps a variance of 1e40 in float64; a GPU's rounding of infinite values is its own.
    if value == 1e20 or x.is_cuda:
        y, expected = y[:, :20], expected[:, :20]
    assert torch.equal(y.isfinite().cpu(), expected.isfinite())
    assert torch.equal(y.isnan().cpu(), expected.isnan())


def test_values_may_be_larger_than_the_root_of_the_largest(any_kernel: Kernel) -> None:
    """Their squares are not in float32."""
    x = 1e20 * (1 + 1e-3 * torch.randn(6, 3, 5, 7, device=device_of(any_kernel)))
    y, _ = any_kernel.normalize(x, any_kernel.moments(x), NormalizeArgs(EPS))
    std = y.double().movedim(1, 0).flatten(1).std(1, correction=0)
    torch.testing.assert_close(std.cpu(), torch.ones(3).double(), rtol=1e-3, atol=0)


def test_relu_gradient_stops_at_zero_and_passes_at_nan(any_kernel: Kernel) -> None:
    """As with torch's ReLU, whose output keeps NaN."""
    x, dy = torch.randn(2, 4, 3, 17, device=device_of(any_kernel))
    x[:, 0], x[0, 1, 5] = 3.0, float("nan")
    statistics = torch.tensor([3.0, 0, 0, 1, 1, 1, 68], device=x.device).double()
    saved = Saved(x, None, None, statistics, None, RELU)
    assert torch.equal(normalize(any_kernel, x, saved).isnan(), x.isnan())
    reduced = any_kernel.backward_reduce(dy, saved, MASK)
    assert torch.equal(any_kernel.unit_derivative(saved), ~(x - statistics[:3, None] <= 0))
    passed = dy.where(~(x[:, 1:2] <= 0), 0)[:, 1].double().sum()
    torch.testing.assert_close(reduced.sums[:2], torch.stack([torch.zeros_like(passed), passed]))
    assert reduced.sums.isnan().tolist() == [False, False, False, False, True, False]
    dx = any_kernel.backward_elemt(saved, reduced, torch.zeros_like(reduced.sums))
    assert torch.equal(dx[:, 0], torch.zeros_like(dx[:, 0]))
    assert torch.equal(dx.isnan(), x.isnan())


def test_gradient_of_any_layout(any_kernel: Kernel) -> None:
    x = torch.randn(4, 5, 6, 7, device=device_of(any_kernel))
    x = x.to(memory_format=torch.channels_last)
    zeros = torch.zeros(10, dtype=torch.float64, device=x.device)
    saved = Saved(x, None, None, torch.cat([zeros[:5], zeros[:6] + 1]), None, None)
    other = torch.randn_like(x, memory_format=torch.contiguous_format)
    for dy in (other, torch.ones((), device=x.device).expand(x.shape)):
        reduced = any_kernel.backward_reduce(dy, saved, MASK)
        sums = torch.cat([dy.double().sum((0, 2, 3)), (dy.double() * x).sum((0, 2, 3))])
        torch.testing.assert_close(reduced.sums, sums, rtol=1e-5, atol=1e-5)
        dx = any_kernel.backward_elemt(saved, reduced, zeros)
        torch.testing.assert_close(dx, dy.expand_as(x), rtol=1e-6, atol=1e-6)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=3),
    samples=st.integers(1, 9),
    channels=st.integers(1, 20),
    draw=st.data(),
    layout=st.sampled_from(LAYOUTS),
    offset=st.sampled_from([0.0, 30.0]),
    affine=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_agrees_with_float64_on_any_shape(
    any_kernel: Kernel,
    shape: list[int],
    samples: int,
    channels: int,
    draw: st.DataObject,
    layout: str,
    offset: float,
    affine: bool,
    seed: int,
) -> None:
    dtype = draw.draw(st.sampled_from(dtypes_of(any_kernel)))
    # ATen's mean of half values is float32: off by 1e-6 standard deviations there.
    assume(offset == 0 or dtype.itemsize > 2 or not isinstance(any_kernel, AtenCudaKernel))
    case = Case(((samples, channels, *shape),), dtype, layout, offset, affine=affine, seed=seed)
    check(any_kernel, case, 4 * tolerance(dtype))


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("cuda", "unknown impl 'cuda'; expected one of auto"),
        ("aten_cuda", "'aten_cuda' does not support 'cpu' tensors"),
    ],
)
def test_impl_never_falls_back(impl: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.select_kernel(impl, torch.empty(1, 1))


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def test_dispatch_modes_receive_composite_formulas() -> None:
    """A tracer saw new memory, and nothing that writes to it; fake tensors were a crash."""
    x = torch.randn(4, 3, 5)
    with Recorder():
        assert kernels.select_kernel("auto", x) is REFERENCE
        if not isinstance(cpu.load(), str):
            with pytest.raises(RuntimeError, match="or a TorchDispatchMode"):
                kernels.select_kernel("cpu", x)
    traced = make_fx(lambda x: syncbn.sync_batch_norm(x, None, None, training=True))(x)
    values = torch.randn(4, 3, 5)
    torch.testing.assert_close(traced(values), F.batch_norm(values, None, None, training=True))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert syncbn.sync_batch_norm(x, None, None, training=True).shape == x.shape


def test_auto_takes_the_fastest_kernel_of_the_device() -> None:
    library = cpu.load()
    fastest = REFERENCE if isinstance(library, str) else library
    assert kernels.select_kernel("auto", torch.empty(1, 1)) is fastest
    assert kernels.select_kernel("auto", torch.empty(1, 1, device="meta")) is REFERENCE
