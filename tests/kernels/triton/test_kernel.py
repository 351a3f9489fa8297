"""The Triton kernel: memory layouts, ReLU masks, running statistics, number of launches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import syncbn
from syncbn.kernels import REFERENCE, Kernel, select_kernel
from syncbn.kernels.base import NormalizeArgs, Saved
from syncbn.kernels.layout import NCSLayout
from syncbn.moments import Moments
from tests.kernel_cases import EPS, RELU, device_of, totals
from tests.ranks import Pool

DEVICE = device_of("triton")
# Programs share the channels of this shape.
SPLIT_SHAPE = (64, 2, 32, 32)
LAYOUTS = ["contiguous", "channels_last", "gaps between samples", "slice of channels"]


@pytest.fixture
def triton() -> Kernel:
    return select_kernel("triton", torch.empty(1, 1, device=DEVICE))


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """Return the names of launched kernels."""
    from syncbn.kernels.triton.launcher import LaunchPlan

    launch = LaunchPlan.__call__
    names: list[str] = []

    def record(self: LaunchPlan, **values: Any) -> None:
        names.append(self._kernel.__name__)
        launch(self, **values)

    with patch.object(LaunchPlan, "__call__", record):
        yield names


@pytest.fixture
def _empty_plan_cache() -> Iterator[None]:
    from syncbn.kernels.triton import launcher

    launcher.plan_launch.cache_clear()
    yield
    launcher.plan_launch.cache_clear()


@pytest.fixture(params=["small", "large"])
def _sizes(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _empty_plan_cache: None
) -> None:
    """Tile tensors as they are, and as large ones: several tiles per program, 64-bit offsets."""
    if request.param == "large":
        monkeypatch.setattr("syncbn.kernels.triton.tiling._MANY_TILES", 0)
        monkeypatch.setattr("syncbn.kernels.triton.tiling._INT32_LIMIT", 0)


def make_tensor(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    size = list(shape)
    if layout == "gaps between samples":
        size[0] *= 2
    if layout == "slice of channels":
        size[1] += 3
    x = torch.randn(size, dtype=torch.float64).to(dtype).to(DEVICE)
    if layout in ("channels_last", "slice of channels"):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x[:: 2 if layout == "gaps between samples" else 1, : shape[1]]


def widen(saved: Saved) -> Saved:
    """Return saved values for the reference in float64, without a stored ReLU mask."""
    return saved._replace(x=saved.x.double(), activation_values=None, layout=None)


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 16, 7), (40, 3, 12, 9), (1, 70, 1, 1)], ids=str)
def test_layouts(triton: Kernel, shape: tuple[int, ...], layout: str) -> None:
    x, dy, residual = (make_tensor(shape, layout) for _ in range(3))
    weight, bias = torch.randn(2, shape[1], 2, device=DEVICE)[..., 0]
    moments = triton.moments(x)
    # A sum may cancel: its rounding error is relative to the sum of absolute values.
    magnitude = totals(REFERENCE.moments(x.double().abs()), shape[1])
    expected = totals(REFERENCE.moments(x.double()), shape[1])
    assert ((moments - expected).abs() <= 5e-7 * magnitude).all()
    args = NormalizeArgs(EPS, weight, bias, activation=RELU)
    y, _ = triton.normalize(x, moments, args, residual)
    expected, _ = REFERENCE.normalize(x.double(), moments, args, residual.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    _, saved = triton.normalize(x, moments, args, None)
    reduced = triton.backward_reduce(dy, saved, (True, True, True, False))
    expected_reduced = REFERENCE.backward_reduce(dy.double(), widen(saved), (True,) * 4)
    sums = expected_reduced.sums
    torch.testing.assert_close(reduced.sums, sums, rtol=1e-5, atol=1e-5)
    assert reduced.dweight is not None
    assert reduced.dbias is not None
    gradients = torch.cat([reduced.dbias, reduced.dweight]).double()
    torch.testing.assert_close(gradients, reduced.sums, rtol=1e-6, atol=1e-6)
    dx = triton.backward_elemt(saved, reduced, sums)
    expected = REFERENCE.backward_elemt(widen(saved), expected_reduced, sums)
    torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_empty_plan_cache")
def test_first_values_far_from_the_mean(triton: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding, say: around the mean of its first values, float32 would lose the variance."""
    monkeypatch.setattr("syncbn.kernels.triton.launcher._INTERPRETED_MULTIPROCESSORS", 1)
    x = torch.full((50, 1, 2048), 1000.1, device=DEVICE)
    x[:2] = 0
    moments = Moments.unpack(triton.moments(x), 1)
    variance = x.double().var(correction=0)
    torch.testing.assert_close(moments.variance()[0], variance, rtol=1e-6, atol=0)


def test_a_launch_resets_its_counters() -> None:
    """Otherwise the next launch would have no last program, or two."""
    from syncbn.kernels.triton import launcher

    x = torch.randn(SPLIT_SHAPE, device=DEVICE)
    expected = totals(REFERENCE.moments(x.double()), x.shape[1])
    layout = NCSLayout.contiguous(x.shape)
    plan = launcher.plan_launch("moments", layout, x.device, (x.dtype, torch.float64))
    workspace = plan.new_workspace()
    for _ in range(2):
        moments = torch.empty_like(expected)
        plan(x_ptr=x, moments_ptr=moments, **workspace)
        torch.testing.assert_close(moments, expected, rtol=1e-6, atol=1e-2)
        assert not workspace["counters_ptr"].any()


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(10, 70, 11, 2), (7, 3)], ids=str)
def test_stored_relu_mask(triton: Kernel, shape: tuple[int, ...], layout: str) -> None:
    x, dy, residual = (make_tensor(shape, layout) for _ in range(3))
    weight = torch.randn(shape[1], device=DEVICE)
    args = NormalizeArgs(EPS, weight, None, activation=RELU)
    y, saved = triton.normalize(x, triton.moments(x), args, residual)
    masked, before = dy * (y > 0), dy.clone()
    plain = widen(saved)._replace(activation=None)
    expected = REFERENCE.backward_reduce(masked.double(), plain, (True,) * 4)
    expected_dx = REFERENCE.backward_elemt(plain, expected, expected.sums)
    assert torch.equal(triton.unit_derivative(saved), y > 0)

    for needs_dx, needs_dresidual in product((True, False), repeat=2):
        output_mask = needs_dx, True, True, needs_dresidual
        reduced = triton.backward_reduce(dy, saved, output_mask)
        pair = reduced.sums, reduced.dweight
        torch.testing.assert_close(pair, expected[:2], rtol=1e-5, atol=1e-5)
        assert reduced.dbias is None
        if needs_dx or needs_dresidual:
            assert torch.equal(reduced.dy, masked)
        assert (reduced.dresidual is not None) == needs_dresidual
        # Then dx may overwrite it.
        assert reduced.inplace_ok == (needs_dx and not needs_dresidual)
        if needs_dx:
            dx = triton.backward_elemt(saved, reduced, expected.sums)
            torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-5, atol=1e-5)
            local_dx, *_, dresidual = triton.backward_local(dy, saved, output_mask)
            torch.testing.assert_close(local_dx, dx, rtol=1e-5, atol=1e-5)
            assert dresidual is None or torch.equal(dresidual, masked)
        if reduced.dresidual is not None:
            assert torch.equal(reduced.dresidual, masked)
        assert torch.equal(dy, before)


def test_an_expanded_gradient_is_copied_once(triton: Kernel) -> None:
    """The gradient of a sum is a single expanded value, which no kernel can read."""
    from syncbn.kernels.layout import match_layout as original

    x = make_tensor((3, 4, 5, 3), "contiguous")
    _, saved = triton.forward_local(x, NormalizeArgs(EPS), None)
    with patch("syncbn.kernels.triton.match_layout", wraps=original) as match_layout:
        triton.backward_local(torch.ones((), device=DEVICE).expand(x.shape), saved, (True,) * 4)
        first, second = (call.args[0] for call in match_layout.call_args_list)
    assert not first.is_contiguous()
    assert second.is_contiguous()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 5, 5), SPLIT_SHAPE], ids=str)
def test_two_launches_forward_and_two_backward(
    launches: list[str], residual: bool, shape: tuple[int, ...]
) -> None:
    layer = syncbn.SyncBatchNorm2d(shape[1], activation="relu").to(DEVICE)
    layer.impl = "triton"
    x, r = torch.randn(2, *shape, device=DEVICE)
    y = layer(x.requires_grad_(), r.requires_grad_() if residual else None)
    assert launches == ["moments", "normalize"]
    y.sum().backward()
    assert launches[2:] == ["backward_reduce", "backward_elemt"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "one channel"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_saved_tensor_hooks_may_change_strides(layout: str, create_graph: bool) -> None:
    """The bits of the ReLU mask are in the order of the values of the original input."""
    order = "channels_last" if layout == "one channel" else layout
    x, residual, dy = (make_tensor((4, 6, 5, 3), order) for _ in range(3))
    if layout == "one channel":
        x, residual, dy = x[:, :1], residual[:, :1], dy[:, :1]
    layer = syncbn.SyncBatchNorm2d(x.shape[1], activation="relu").to(DEVICE)
    layer.impl = "triton"
    x = x.detach().requires_grad_()

    def gradient() -> Tensor:
        (dx,) = torch.autograd.grad(layer(x, residual), x, dy, create_graph=create_graph)
        return dx

    def swap_layout(t: Tensor) -> Tensor:
        is_contiguous = t.ndim == 4 and t.is_contiguous()
        format = torch.channels_last if is_contiguous else torch.contiguous_format
        return t.contiguous(memory_format=format)

    expected = gradient()
    with torch.autograd.graph.saved_tensors_hooks(swap_layout, lambda t: t):
        actual = gradient()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty_relu_mask(triton: Kernel, shape: tuple[int, ...]) -> None:
    """A byte was written for a position that does not exist: on a GPU, to address zero."""
    x = torch.empty(shape, device=DEVICE)
    args = NormalizeArgs(EPS, activation=RELU)
    y, saved = triton.normalize(x, triton.moments(x), args, x)
    assert saved.activation_values is not None
    assert saved.activation_values.numel() == 0
    guarded = saved._replace(
        activation_values=torch.full((64,), 7, dtype=torch.uint8, device=DEVICE)
    )
    reduced = triton.backward_reduce(x, guarded, (True,) * 4)
    assert y.shape == reduced.dy.shape == triton.unit_derivative(guarded).shape == shape
    assert not reduced.sums.any()


SHARES = [(3, 4, 5, 3), (2, 4, 5, 3), (0, 4, 5, 3)]


def _gradients(rank: int, impl: str) -> list[Tensor | None]:
    gradients: list[Tensor | None] = []
    for needs_x, needs_residual in product((True, False), repeat=2):
        torch.manual_seed(rank)
        layer = syncbn.SyncBatchNorm2d(4, activation="relu").to(DEVICE)
        layer.impl = impl
        x, residual, dy = torch.randn(3, *SHARES[rank], device=DEVICE)
        before = dy.clone()
        x.requires_grad_(needs_x)
        residual.requires_grad_(needs_residual)
        layer(x, residual).backward(dy)
        assert torch.equal(dy, before)
        gradients += [t.grad for t in (x, residual, layer.weight, layer.bias)]
    return gradients


def test_gradients_of_a_group(pool: Pool) -> None:
    """A residual, a ReLU, frozen inputs; one rank has no values."""
    actual, expected = (pool(3, "gloo").run(_gradients, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
