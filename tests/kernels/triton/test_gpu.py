"""Layers on a GPU: no synchronization, streams, number of launches, sizes.

The kernels and layers over ranks are tested by the rows of tests/kernel_cases.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import syncbn
from syncbn.kernels import select_kernel
from syncbn.kernels.layout import NCSLayout
from tests.kernels.triton.gpu import CUDA, MARKS, check_synchronization, make_layer, make_step

pytestmark = MARKS


def test_programs_share_channels() -> None:
    """64 samples, also in the tests below: programs combine their partial sums."""
    from syncbn.kernels.triton import launcher

    _, x, _ = make_layer(64)
    plan = launcher.plan_launch("moments", NCSLayout.contiguous(x.shape), x.device, (x.dtype,))
    assert "counters_ptr" in plan.new_workspace()


def test_auto_selects_triton() -> None:
    from syncbn.kernels.triton import TritonKernel

    assert isinstance(select_kernel("auto", torch.empty(1, 1, device=CUDA)), TritonKernel)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("samples", [4, 0])
def test_a_step_does_not_synchronize(samples: int, residual: bool) -> None:
    check_synchronization(make_step(*make_layer(samples), residual))


def all_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_results_do_not_depend_on_the_stream() -> None:
    layer, x, dy = make_layer(64)
    run = make_step(layer, x, dy, residual=True)
    expected = run()
    for _ in range(20):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            actual = run()
            # Reuses memory that was freed too early.
            noise = [torch.randn_like(t) for t in (x, dy)]
        torch.cuda.current_stream().wait_stream(side)
        assert all_equal(actual, expected)
        del noise


def test_concurrent_streams_do_not_interfere() -> None:
    """The counters that programs share belong to a stream."""
    runs = [make_step(*make_layer(64)) for _ in range(2)]
    expected = [run() for run in runs]
    sides = [torch.cuda.Stream() for _ in runs]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for side, run in zip(sides, runs, strict=True):
            with torch.cuda.stream(side):
                results.append(run())
        torch.cuda.synchronize()
        assert all(map(all_equal, results, expected))


def test_threads_may_share_a_stream() -> None:
    """The two launches of a pass share no memory with launches of another thread."""
    runs = [make_step(*make_layer(64)) for _ in range(2)]
    expected = [run() for run in runs]

    def repeat(i: int) -> bool:
        return all(all_equal(runs[i](), expected[i]) for _ in range(50))

    with ThreadPoolExecutor(len(runs)) as pool:
        assert all(pool.map(repeat, range(len(runs))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unaligned_tensors(dtype: torch.dtype) -> None:
    """Kernels compiled for 16-byte aligned pointers run with aligned pointers only."""
    layer, x, dy = make_layer()
    x, dy = x.detach().to(dtype).requires_grad_(), dy.to(dtype)
    expected = make_step(layer, x, dy)()
    moved = torch.empty(x.numel() + 1, dtype=dtype, device=CUDA)[1:].view_as(x)
    moved.copy_(x.detach())
    actual = make_step(layer, moved.detach().requires_grad_(), dy)()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 56, 56), (64, 2048, 7, 7), (2, 8, 3, 3)], ids=str)
def test_two_launches_forward_and_two_backward(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    layer = syncbn.SyncBatchNorm2d(shape[1], activation="relu").to(CUDA)
    x = torch.randn(shape, device=CUDA).bfloat16().contiguous(memory_format=layout)
    leaf, dy = x.requires_grad_(), torch.randn_like(x)
    run = make_step(layer, leaf, dy)
    # The first step compiles.
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        run()
        torch.cuda.synchronize()
    kernels = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 4, kernels


def test_launches_are_on_the_device_of_the_tensor() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    layer, x, dy = make_layer()
    expected = make_step(layer, x, dy)()
    moved = x.detach().to(other).requires_grad_()
    for actual, y in zip(make_step(layer.to(other), moved, dy.to(other))(), expected, strict=True):
        assert torch.equal(actual.to(CUDA), y)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_more_than_2_to_the_31_elements(layout: torch.memory_format) -> None:
    size = (33, 64, 1024, 1024)
    if torch.cuda.mem_get_info()[0] < 6 * 2 * 33 * 2**26:
        pytest.skip("needs memory for six tensors of 4 GB")
    x = torch.empty(size, dtype=torch.bfloat16, device=CUDA, memory_format=layout)
    assert x.numel() > 2**31
    for sample in x:
        sample.normal_()
    x[-1] += 1
    y = syncbn.sync_batch_norm(x.requires_grad_(), None, None, training=True, impl="triton")
    part = x[:, 5].detach().double()
    invstd = part.var(correction=0).add(1e-5).rsqrt()
    expected = (part[-1] - part.mean()) * invstd
    assert ((y[-1, 5].double() - expected).abs() <= 2**-8 * expected.abs().clamp(min=1)).all()
    # dy of the last sample only: dx is dy without its mean and its projection on xhat.
    dy = torch.zeros_like(x)
    dy[-1] = y.detach()[-1]
    (dx,) = torch.autograd.grad(y, x, dy)
    xhat, last = (part - part.mean()) * invstd, dy[-1, 5].double()
    mean, slope = last.sum() / part.numel(), (last * xhat[-1]).sum() / part.numel()
    expected = (last - mean - xhat[-1] * slope) * invstd
    assert ((dx[-1, 5].double() - expected).abs() <= 2**-7 * expected.abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast(dtype: torch.dtype) -> None:
    conv, layer = nn.Conv2d(3, 8, 3).to(CUDA), syncbn.SyncBatchNorm2d(8).to(CUDA)
    x = torch.randn(4, 3, 12, 12, device=CUDA)
    with torch.autocast("cuda", dtype):
        y = layer(conv(x))
        expected = F.batch_norm(conv(x).float(), None, None, training=True)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=2**-7)
