"""The Triton kernels: what GPUs get, and what the rows of all kernels leave out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import _lru_cache_wrapper
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import syncbn
from syncbn.kernels import Forward, Running, Transform, choose, reference
from syncbn.kernels.layout import Samples
from syncbn.moments import Moments
from tests.kernel_cases import EPS, device_of, totals

DEVICE = device_of("triton")
# Whose channels are shared by programs.
SHARED = (64, 4, 32, 32)
SHAPES = [(2, 5), (3, 16, 7), (4, 6, 5, 3), (40, 3, 12, 9), (1, 70, 1, 1)]
LAYOUTS = ["contiguous", "channels_last", "gaps between samples", "channels of more"]


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """Return the names of kernels that are launched, by Python."""
    from syncbn.kernels.triton.launcher import Launch

    run = Launch.__call__
    seen: list[str] = []

    def noted(self: Launch, *given: Any) -> None:
        seen.extend(step.kernel.__name__ for step in self.steps)
        run(self, *given)

    with patch.object(Launch, "__call__", noted):
        yield seen


def tensor(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    size = list(shape)
    if layout == "gaps between samples":
        size[0] *= 2
    if layout == "channels of more":
        size[1] += 3
    x = torch.randn(size, dtype=torch.float64).to(dtype).to(DEVICE)
    if layout != "contiguous" and layout != "gaps between samples":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x[:: 2 if layout == "gaps between samples" else 1, : shape[1]]


@pytest.fixture(params=["small", "large"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have tensors taken for what they are, and for large ones.

    Of these, programs of elementwise passes take several tiles, and offsets may need 64 bits.
    """
    from syncbn.kernels.triton import plans as triton_passes

    kept = [f for f in vars(triton_passes).values() if isinstance(f, _lru_cache_wrapper)]
    assert len(kept) == 5
    if request.param == "large":
        monkeypatch.setattr("syncbn.kernels.triton.tiling._MANY", 0)
        monkeypatch.setattr("syncbn.kernels.triton.tiling._WIDE", 0)
    for launch in kept:
        launch.cache_clear()
    yield
    for launch in kept:
        launch.cache_clear()


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts(shape: tuple[int, ...], layout: str) -> None:
    kernel = choose("triton", torch.empty(1, 1, device=DEVICE))
    x, dy, residual = (tensor(shape, layout) for _ in range(3))
    weight, bias = torch.randn(2, shape[1], 2, device=DEVICE)[..., 0]
    message = kernel.moments(x)
    # A sum may cancel: its rounding is of what is added up.
    added = totals(reference.moments(x.double().abs()), shape[1])
    wanted = totals(reference.moments(x.double()), shape[1])
    assert ((message - wanted).abs() <= 5e-7 * added).all()
    how = Forward(EPS, weight, bias, True)
    y, statistics = kernel.normalize(x, message, how, residual)
    wanted, _ = reference.normalize(x.double(), message, how, residual.double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=1e-6)
    transform = Transform(statistics, weight, bias, True)
    sums, dweight, dbias = kernel.backward_reduce(dy, x, transform, (weight, bias))
    wanted_sums, _, _ = reference.backward_reduce(dy.double(), x.double(), transform)
    torch.testing.assert_close(sums, wanted_sums, rtol=1e-5, atol=1e-5)
    assert dweight is not None
    assert dbias is not None
    torch.testing.assert_close(torch.cat([dbias, dweight]).double(), sums, rtol=1e-6, atol=1e-6)
    dx = kernel.backward_elemt(dy, x, transform, sums)
    wanted = reference.backward_elemt(dy.double(), x.double(), transform, sums)
    torch.testing.assert_close(dx.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_program_may_begin_far_from_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """In padding, say: around its mean, float32 would lose the variance."""
    from syncbn.kernels import triton
    from syncbn.kernels.triton import plans as triton_passes

    monkeypatch.setattr(triton_passes, "_multiprocessors", lambda _: 1)
    x = torch.full((200, 1, 2048), 1000.1, device=DEVICE)
    x[:2] = 0
    found = Moments.unpack(triton.moments(x), 1)
    torch.testing.assert_close(found.variance()[0], x.double().var(correction=0), rtol=1e-6, atol=0)


def test_counters_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next launch would have no last program, or two."""
    from syncbn.kernels import triton
    from syncbn.kernels.triton import plans as triton_passes
    from syncbn.kernels.triton.launcher import Shared, _Memory

    triton_passes.moments.cache_clear()
    used: list[Tensor] = []
    memory, of = _Memory(DEVICE), _Memory.of

    def noted(_: _Memory, shared: Shared) -> dict[str, Tensor]:
        found = of(memory, shared)
        used.append(found["arrivals_ptr"])
        return found

    monkeypatch.setattr(_Memory, "of", noted)
    x = torch.randn(SHARED, device=DEVICE)
    wanted = totals(reference.moments(x.double()), x.shape[1])
    for _ in range(2):
        torch.testing.assert_close(triton.moments(x), wanted, rtol=1e-6, atol=1e-2)
    assert used
    assert not used[0].any()


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", [0, 1, 5])
def test_running_averages(momentum: float | None, dtype: torch.dtype, samples: int) -> None:
    """More blocks of channels than one: one program of all counts the batch."""
    x = torch.randn(samples, 700, device=DEVICE)
    kernel = choose("triton", x)
    message = kernel.moments(x)

    def moved(by: Any) -> list[Tensor]:
        mean = torch.linspace(-1, 1, 700, device=DEVICE).to(dtype)
        found = Running(mean, mean.exp(), torch.tensor(3, device=DEVICE), momentum)
        versions = [t._version for t in found[:3] if t is not None]
        by.normalize(x, message, Forward(EPS, running=found))
        tensors = [t for t in found[:3] if t is not None]
        assert all(t._version > v for t, v in zip(tensors, versions, strict=True))
        return tensors

    for found, wanted in zip(moved(kernel), moved(reference), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("may_overwrite", [False, True])
@pytest.mark.parametrize("shape", [(40, 3, 12, 9), (10, 70, 11, 2), (7, 3)], ids=str)
def test_a_gradient_goes_through_the_relu_of_an_output(
    shape: tuple[int, ...], layout: str, may_overwrite: bool
) -> None:
    from syncbn.kernels import triton

    x, dy, residual = (tensor(shape, layout) for _ in range(3))
    weight = torch.randn(shape[1], device=DEVICE)
    message = triton.moments(x)
    gate = triton.new_gate(x)
    how = Forward(EPS, weight, None, True, gate=gate)
    y, statistics = triton.normalize(x, message, how, residual)
    transform = Transform(statistics, weight, None)
    wanted = dy * (y > 0)
    wanted_sums, _, _ = reference.backward_reduce(wanted.double(), x.double(), transform)
    before = dy.clone()

    def fresh() -> Tensor:
        return dy.clone(memory_format=torch.preserve_format) if may_overwrite else dy

    given = fresh()
    found = triton.backward_reduce_gated(given, gate, x, transform, (weight, None), may_overwrite)
    gated, sums, dweight, dbias = found
    assert torch.equal(gated, wanted)
    assert (gated.data_ptr() == given.data_ptr()) == may_overwrite
    torch.testing.assert_close(sums, wanted_sums, rtol=1e-5, atol=1e-5)
    assert dweight is not None
    assert dbias is None

    # In two launches.
    given = fresh()
    same_dy, *same = triton.backward_reduce_gated(
        given, gate, x, transform, (weight, None), may_overwrite, write=False
    )
    assert torch.equal(given, before)
    torch.testing.assert_close(same, [sums, dweight, dbias], rtol=0, atol=0)
    assert torch.equal(triton.through_gate(same_dy, gate, x), wanted)

    wanted_dx = reference.backward_elemt(wanted.double(), x.double(), transform, wanted_sums)
    for keep in (False, True):
        kept, dx, again, dbias = triton.backward_alone_gated(
            fresh(), gate, x, transform, (weight, None), may_overwrite, keep
        )
        torch.testing.assert_close(dx.double(), wanted_dx, rtol=1e-5, atol=1e-5)
        assert again is not None
        assert torch.equal(again, dweight)
        assert dbias is None
        assert (kept is not None) == keep
        assert kept is None or torch.equal(kept, wanted)
    assert torch.equal(dy, before)
    assert torch.equal(triton.opened(gate, x), y > 0)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 5, 5), SHARED], ids=str)
def test_two_launches_forward_and_two_backward(
    launches: list[str], residual: bool, shape: tuple[int, ...]
) -> None:
    layer = syncbn.SyncBatchNorm2d(4, activation="relu").to(DEVICE)
    layer.impl = "triton"
    x, r = torch.randn(2, *shape, device=DEVICE)
    y = layer(x.requires_grad_(), r.requires_grad_() if residual else None)
    assert launches == ["moments", "normalize"]
    y.sum().backward()
    assert launches[2:] == ["backward_reduce", "backward_elemt"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("twice", [False, True])
def test_hooks_of_saved_tensors_may_change_how_they_lie(layout: str, twice: bool) -> None:
    """What came through the ReLU is noted in the order in which the input lay."""
    layer = syncbn.SyncBatchNorm2d(6, activation="relu").to(DEVICE)
    layer.impl = "triton"
    x, residual, dy = (tensor((4, 6, 5, 3), layout) for _ in range(3))
    x.requires_grad_()

    def gradient() -> Tensor:
        (found,) = torch.autograd.grad(layer(x, residual), x, dy, create_graph=twice)
        return found

    def turned(t: Tensor) -> Tensor:
        last = t.ndim == 4 and t.is_contiguous()
        return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    wanted = gradient()
    with torch.autograd.graph.saved_tensors_hooks(turned, lambda t: t):
        found = gradient()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
def test_nothing_is_noted_where_there_are_no_values(shape: tuple[int, ...]) -> None:
    """A byte was written for a position that is not there: on a GPU, to address zero."""
    from syncbn.kernels import triton

    x = torch.empty(shape, device=DEVICE)
    assert triton.new_gate(x).numel() == 0
    gate = torch.full((64,), 7, dtype=torch.uint8, device=DEVICE)
    message = triton.moments(x)
    y, statistics = triton.normalize(x, message, Forward(EPS, relu=True, gate=gate), x)
    found = triton.backward_reduce_gated(x, gate, x, Transform(statistics))
    assert y.shape == found[0].shape == triton.opened(gate, x).shape == shape
    assert triton.through_gate(x, gate, x).shape == shape
    assert torch.equal(gate, torch.full_like(gate, 7))


@pytest.mark.parametrize(("last", "most"), [(False, 70), (True, 35)])
def test_images_of_many_sizes_share_what_is_compiled(last: bool, most: int) -> None:
    """To compile a kernel takes a second."""
    from syncbn.kernels.triton import plans as triton_passes

    sizes = torch.randint(12, 200, (100, 2), generator=torch.Generator().manual_seed(0))
    compiled = set()
    for space in sizes.prod(1).tolist():
        samples = Samples(4 * space, 256, 1, 256, 256) if last else Samples.dense((4, 256, space))
        kinds: list[torch.dtype | None] = [torch.bfloat16, *[None] * 10]
        forward = triton_passes.forward(samples, DEVICE, tuple(kinds), False, False)
        kinds[triton_passes.BACKWARD.index("dx_ptr")] = torch.bfloat16
        given = samples, DEVICE, tuple(kinds), samples.dense_stride, False
        passes = [forward, triton_passes.backward(*given)]
        for step in itertools.chain(*(launch.steps for launch in passes)):
            names = {*step.kernel.arg_names, "num_warps", "maxnreg"}
            constants = tuple(str(v) for k, v in step.constants.items() if k in names)
            ones = tuple(name for name, size in step.sizes.items() if size == 1)
            compiled.add((step.kernel.__name__, constants, ones))
    assert len(compiled) <= most
