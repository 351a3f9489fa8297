"""Each kernel against formulas in float64 on one process: layouts, sizes, adversarial values."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import Case, batch, parameters
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn import kernels
from syncbn.kernels import REFERENCE, cpu
from syncbn.kernels.base import Kernel, NormalizeArgs, RunningStats, Saved
from syncbn.moments import Moments
from tests.kernel_cases import (
    DTYPES,
    EPS,
    KERNELS,
    KERNELS_AND_DTYPES,
    backward_elemt,
    device_of,
    dtypes_of,
    normalize,
    tolerance,
)

LAYOUTS = ["contiguous", "channels_last", "strided"]
SHAPES = [(4, 3), (1, 5, 7), (3, 1, 6, 5), (2, 17, 1, 1), (2, 7, 3, 4, 5), (3, 64, 28, 28)]


def close(actual: Tensor, wanted: Tensor, bound: float, largest_term: Tensor) -> None:
    """Compare by the largest error over the largest of the terms that are added up."""
    assert actual.shape == wanted.shape
    error = (actual.cpu().double() - wanted).abs().max()
    assert error <= bound * largest_term, f"{error} over {largest_term}"


def check(kernel: str, case: Case, bound: float) -> None:
    """Compare a kernel with float64 formulas on its device."""
    device = device_of(kernel)
    check_module(kernels.select_kernel(kernel, torch.empty(0, device=device)), case, bound, device)


def check_module(chosen: Kernel, case: Case, bound: float, device: torch.device) -> None:
    """Compare the four functions of a kernel with float64 formulas on the same values."""
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

    found = Moments.unpack(chosen.moments(x).cpu(), case.channels)
    assert found.count == values.shape[1]
    std = var.sqrt().clamp(min=1e-30)
    # Raw float64 sums in a message of one part add 1e-16 (mean/std)^2.
    raw = 0.0 if case.dtype == torch.float64 else 1e-15
    allowed = min(bound, 1e-6) + raw * (mean / std).square().max()
    if var.min() > 1e-4 * var.max():
        assert ((found.mean() - mean) / std).abs().max() <= allowed
        assert ((found.variance() - var) / var).abs().max() <= allowed

    weight, bias = (None if t is None else t.to(device) for t in (weight, bias))
    count = torch.tensor([float(values.shape[1])], dtype=torch.float64)
    statistics = torch.cat([mean, invstd, count]).to(device)
    saved = Saved(x, weight, bias, statistics, None, False)
    result = normalize(chosen, x, saved)
    assert result.dtype == x.dtype
    if case.layout != "strided":
        assert result.stride() == x.stride()
    # So does the message here, where there may be two values a channel and hardly a variance.
    passed = bound + raw * (mean * invstd).square().max().item()
    close(result, restore(y), passed, y.abs().max().clamp(min=1e-9))

    sums = torch.cat([gradients.sum(1), (gradients * xhat).sum(1)])
    found_sums = chosen.backward_reduce(dy, saved, (True, True, True, False)).sums
    # A sum may cancel: its rounding depends on the terms, not on the result.
    added = torch.cat([gradients.abs().sum(1), (gradients * xhat).abs().sum(1)])
    assert ((found_sums.cpu() - sums).abs() <= 1e-6 * added.clamp(min=1e-9)).all()

    mean_dy, mean_dy_xhat = (sums / count).view(2, -1, 1)
    dx = (gradients - mean_dy - xhat * mean_dy_xhat) * (invstd * scale)[:, None]
    found_dx = backward_elemt(chosen, dy, x, saved, sums.to(device))
    assert found_dx.dtype == x.dtype
    # With two values a channel dx is a difference that all but vanishes.
    largest_term = (gradients * (invstd * scale)[:, None]).abs().max()
    close(found_dx, restore(dx), bound, largest_term)


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_AND_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_agrees_with_float64(kernel: str, dtype: torch.dtype, layout: str) -> None:
    for shape, affine in itertools.product(SHAPES, (True, False)):
        check(kernel, Case((shape,), dtype, layout, affine=affine), tolerance(dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [1.0, 2.0, 4.0, 7.0, 9.0, 100.0, 1e4])
def test_kernel_keeps_precision_far_from_zero(kernel: str, layout: str, offset: float) -> None:
    """A float32 mean is off by 6e-4 standard deviations at mean/std = 1e4."""
    for shape in (*SHAPES[-2:], (37, 5, 5, 5), (3, 4, 25, 25)):
        check(kernel, Case((shape,), layout=layout, offset=offset), 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernel_keeps_precision_of_two_values(kernel: str, layout: str) -> None:
    """Regression: Triton summed around zero up to a mean of four standard deviations."""
    means = torch.linspace(0, 6, 4096, dtype=torch.float64)
    x = (means + torch.tensor([[1.0], [-1.0]])).mul(torch.rand(4096) + 0.5).float()
    values = x if layout == "channels_last" else x[..., None]
    values = values.to(device_of(kernel))
    found = Moments.unpack(kernels.select_kernel(kernel, values).moments(values).cpu(), 4096)
    var = x.double().var(0, correction=0)
    assert ((found.variance() - var) / var).abs().max() <= 1e-6


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_keeps_precision_of_tiny_variances(kernel: str, layout: str) -> None:
    """Variance 1e-10, far below eps: lost when it travels as 1/sqrt(var + eps)."""
    for shape in SHAPES[-2:]:
        check(kernel, Case((shape,), layout=layout, scale=1e-5), 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_sums_long_channels(kernel: str, layout: str) -> None:
    """Runs longer than a block, and a last block that is not full."""
    check(kernel, Case(((2, 3, 301, 401),), layout=layout, offset=3.0), 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_ignores_where_the_outlier_is(kernel: str) -> None:
    """Sums around the first value would be raw sums here: it is padding."""
    x = torch.randn(4, 8, 40, 40, dtype=torch.float64).add(1e3).float()
    x[0, :, 0, 0] = 0
    device = device_of(kernel)
    found = Moments.unpack(
        kernels.select_kernel(kernel, x.to(device)).moments(x.to(device)).cpu(), 8
    )
    values = x.double().movedim(1, 0).reshape(8, -1)
    var = values.var(1, correction=0)
    torch.testing.assert_close(found.variance(), var, rtol=1e-6, atol=0)
    assert ((found.mean() - values.mean(1)) / var.sqrt()).abs().max() <= 1e-6


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernel_finds_a_constant_channel_constant(kernel: str, layout: str) -> None:
    """Raw sums leave 1e-16 v^2, which for v = 1e6 is far above eps."""
    for value in (0.1, 1e3 + 0.1, 1e4 + 0.1, 1e5 + 0.3, 1e6 + 0.3):
        x = torch.full((6, 3, 13, 11), value, device=device_of(kernel))
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        found = Moments.unpack(kernels.select_kernel(kernel, x).moments(x), 3)
        assert torch.equal(found.variance(), torch.zeros_like(found.sum))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtypes", [*itertools.product([*DTYPES, None], repeat=2)], ids=str)
def test_parameter_gradients(
    kernel: str, dtypes: tuple[torch.dtype | None, torch.dtype | None]
) -> None:
    device = device_of(kernel)
    chosen = kernels.select_kernel(kernel, torch.empty(0, device=device))
    for channels in (1, 2, 7, 8, 17, 33, 64):
        x, dy = torch.randn(2, 5, channels, 3, device=device)
        statistics = torch.cat([torch.randn(channels), torch.rand(channels + 1)]).double()
        weight, bias = (
            None if dtype is None else torch.rand(channels, dtype=dtype, device=device)
            for dtype in dtypes
        )
        saved = Saved(x, weight, bias, statistics.to(device), None, False)
        reduced = chosen.backward_reduce(dy, saved, (True, True, True, False))
        sums = reduced.sums
        local = chosen.backward_local(dy, saved, (True, True, True, False))[1:3]
        for dweight, dbias in (reduced[1:3], local):
            for gradient, part, like in ((dweight, sums[channels:], weight), (dbias, sums, bias)):
                if like is None or gradient is None:
                    assert gradient is like
                else:
                    assert torch.equal(gradient, part[:channels].to(like.dtype))
                    assert gradient._base is None
        assert chosen.backward_reduce(dy, saved, (True, False, False, False))[1:4] == (None,) * 3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_kernel_takes_no_values(kernel: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=device_of(kernel))
    chosen = kernels.select_kernel(kernel, x)
    zeros = torch.zeros(7, dtype=torch.float64, device=x.device)
    saved, sums = Saved(x, None, None, zeros, None, False), zeros[:6]
    assert torch.equal(chosen.moments(x), zeros)
    y, _ = chosen.normalize(x, zeros, NormalizeArgs(EPS))
    assert y.shape == shape
    reduced = chosen.backward_reduce(x, saved, (True, True, True, False))
    assert torch.equal(reduced.sums, sums)
    assert chosen.backward_elemt(saved, reduced, sums).shape == shape


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_kernel_propagates_nan_in_its_channel_only(kernel: str, bad: float) -> None:
    x = torch.randn(3, 4, 5, 6, device=device_of(kernel))
    x[1, 2, 3, 4] = bad
    chosen = kernels.select_kernel(kernel, x)
    found = Moments.unpack(chosen.moments(x), 4)
    y, _ = chosen.normalize(x, found.pack(), NormalizeArgs(EPS))
    clean = y.movedim(1, 0).isfinite().flatten(1)
    assert not clean[2].any() or bad == float("inf")
    assert clean[[0, 1, 3]].all()
    assert not found.variance()[2].isfinite()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("what", ["NaN", "infinity", "a variance beyond float32"])
def test_nonfinite_reaches_running_statistics(kernel: str, what: str) -> None:
    """A step that diverged left averages as if there had been no variance."""
    x = torch.randn(6, 3, 5, 7, device=device_of(kernel))
    match what:
        case "NaN":
            x[1, 2, 3, 4] = float("nan")
        case "infinity":
            x[1, 2, 3, 4] = float("inf")
        case _:
            x[:, 2] *= 1e20
    mean, var = torch.stack([torch.zeros(3), torch.ones(3)]).to(x.device)
    chosen = kernels.select_kernel(kernel, x)
    how = NormalizeArgs(EPS, running=RunningStats(mean, var, None, 0.1))
    chosen.normalize(x, chosen.moments(x), how)
    assert var.isfinite().tolist() == [True, True, False]
    assert mean[:2].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_may_be_larger_than_the_root_of_the_largest(kernel: str) -> None:
    """Their squares are not in float32."""
    x = 1e20 * (1 + 1e-3 * torch.randn(6, 3, 5, 7, device=device_of(kernel)))
    chosen = kernels.select_kernel(kernel, x)
    y, _ = chosen.normalize(x, chosen.moments(x), NormalizeArgs(EPS))
    std = y.double().movedim(1, 0).flatten(1).std(1, correction=0)
    torch.testing.assert_close(std.cpu(), torch.ones(3).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [0.1, 1e3 + 0.1, 1e6 + 0.3])
def test_a_constant_channel_has_no_variance(kernel: str, value: float) -> None:
    x = torch.full((7, 2, 11, 5), value, device=device_of(kernel))
    chosen = kernels.select_kernel(kernel, x)
    _, saved = chosen.normalize(x, chosen.moments(x), NormalizeArgs(EPS))
    torch.testing.assert_close(saved.statistics[2:4].cpu(), torch.full((2,), EPS**-0.5).double())


@pytest.mark.parametrize("kernel", KERNELS)
def test_relu_is_closed_at_zero_and_open_at_nan(kernel: str) -> None:
    """As torch's is, to gradients."""
    x, dy = torch.randn(2, 4, 3, 5, device=device_of(kernel))
    x[:, 0], x[0, 1, 0] = 3.0, float("nan")
    chosen = kernels.select_kernel(kernel, x)
    _, saved = chosen.normalize(x, chosen.moments(x), NormalizeArgs(EPS, relu=True))
    reduced = chosen.backward_reduce(dy, saved, (True, True, True, False))
    sums = reduced.sums
    assert torch.equal(sums[:4:3], torch.zeros(2, device=x.device).double())
    torch.testing.assert_close(sums[1], dy[:, 1].double().sum())
    dx = chosen.backward_elemt(saved, reduced, torch.zeros_like(sums))
    assert torch.equal(dx[:, 0], torch.zeros_like(dx[:, 0]))
    assert dx[:, 1].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gradient", ["expanded", "other layout"])
def test_kernel_takes_any_gradient_layout(kernel: str, gradient: str) -> None:
    x = torch.randn(4, 5, 6, 7, device=device_of(kernel)).to(memory_format=torch.channels_last)
    dy = torch.randn_like(x, memory_format=torch.contiguous_format)
    if gradient == "expanded":
        dy = torch.ones((), device=x.device).expand(x.shape)
    chosen = kernels.select_kernel(kernel, x)
    zeros = torch.zeros(10, dtype=torch.float64, device=x.device)
    statistics = torch.cat([zeros[:5], zeros[:6] + 1])
    saved = Saved(x, None, None, statistics, None, False)
    reduced = chosen.backward_reduce(dy, saved, (True, True, True, False))
    wanted = torch.cat([dy.double().sum((0, 2, 3)), (dy.double() * x).sum((0, 2, 3))])
    torch.testing.assert_close(reduced.sums, wanted, rtol=1e-5, atol=1e-5)
    dx = chosen.backward_elemt(saved, reduced, zeros)
    torch.testing.assert_close(dx, dy.expand_as(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
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
def test_kernel_agrees_with_float64_on_any_shape(
    kernel: str,
    shape: list[int],
    samples: int,
    channels: int,
    draw: st.DataObject,
    layout: str,
    offset: float,
    affine: bool,
    seed: int,
) -> None:
    dtype = draw.draw(st.sampled_from(dtypes_of(kernel)))
    case = Case(((samples, channels, *shape),), dtype, layout, offset, affine=affine, seed=seed)
    check(kernel, case, 4 * tolerance(dtype))


def test_unknown_kernel_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown impl 'cuda'; expected one of auto"):
        kernels.select_kernel("cuda", torch.empty(1, 1))


def test_named_kernel_never_falls_back() -> None:
    with pytest.raises(ValueError, match="'aten_cuda' does not support 'cpu' tensors"):
        kernels.select_kernel("aten_cuda", torch.empty(1, 1))


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
    found = cpu.load()
    fastest = REFERENCE if isinstance(found, str) else found
    assert kernels.select_kernel("auto", torch.empty(1, 1)) is fastest
    assert kernels.select_kernel("auto", torch.empty(1, 1, device="meta")) is REFERENCE
