"""The C++ kernels on every small size, on large tensors, any strides, any number of threads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from syncbn.kernels import REFERENCE, cpu
from syncbn.kernels.base import NormalizeArgs, Saved
from syncbn.kernels.coefficients import split_statistics
from syncbn.kernels.layout import as_dense
from tests.kernel_cases import (
    EPS,
    backward_elemt,
    compute_all,
    cpp,
    is_equal_in_place,
    levels,
    needs_cpp,
    normalize,
    saved_for,
    tolerance,
)

pytestmark = needs_cpp

LONGEST = 70


def last_channels(x: Tensor) -> Tensor:
    """Return x in channels_last, of any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def largest_invstd(saved: Saved) -> float:
    """Return the largest 1/sqrt(var + eps) of a forward pass."""
    return float(split_statistics(saved.statistics)[1].max())


def largest(t: Tensor) -> Tensor:
    """Return the largest magnitude, zero for an empty tensor."""
    return t.abs().max() if t.numel() else t.new_zeros(())


# Which of everything are sums over a channel, and which are float64.
SUMS = (0, 1, 6, 7)
C_NUMBERS = (*SUMS, 5)


class Near:
    """Return whether all results are within their bounds."""

    def __init__(self, wanted: list[Tensor], bounds: list[Tensor]) -> None:
        pairs = zip(wanted, bounds, strict=True)
        self.limits = torch.cat([bound.expand_as(t) for t, bound in pairs])
        self.wanted = torch.cat(wanted)

    def __call__(self, found: list[Tensor]) -> bool:
        return bool(((torch.cat(found) - self.wanted).abs() <= self.limits).all())


def bounds(wanted: list[Tensor], how: Saved, dy: Tensor) -> list[Tensor]:
    """Return 1e-6 of the largest value of each kind, or of the sum of its terms' magnitudes."""
    # Sums of random numbers grow as their square root, and now and then all but vanish.
    typical = max(1.0, (dy.numel() / dy.shape[1]) ** 0.5)
    least = [typical if i in SUMS else 1.0 for i in range(len(wanted))]
    found = [1e-6 * largest(t).clamp(min=m) for t, m in zip(wanted, least, strict=True)]
    # Of few values a channel, dx is a difference of these that all but vanishes.
    found[-1] = 1e-6 * largest_invstd(how) * 1.5 * largest(dy)
    return found


@pytest.mark.parametrize("channels", range(1, LONGEST + 1))
def test_every_small_size(channels: int) -> None:
    """Vectors that are full, begun, or less than one; rows, lines of several samples, rests."""
    generator = torch.Generator().manual_seed(channels)
    memory = torch.randn(2, 3 * channels * LONGEST + 16, generator=generator)
    for samples, space in itertools.product((0, 1, 3), range(1, LONGEST + 1)):
        numel = samples * channels * space
        # Not aligned to anything but its own size.
        x, dy = memory[:, space % 16 :][:, :numel].view(2, samples, channels, space)
        how = saved_for(x)
        wanted = compute_all(REFERENCE, x.double(), dy.double(), how)
        near = Near(wanted, bounds(wanted, how, dy))
        for kernel, values in itertools.product(levels(), (x, last_channels(x))):
            assert near(compute_all(kernel, values, dy, how)), (samples, space, kernel)


# Around the sizes of vectors.
EDGES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 70)


@pytest.mark.parametrize("channels", EDGES)
def test_dx_over_dy(channels: int) -> None:
    for samples, space in itertools.product(range(1, 4), EDGES):
        x, dy = torch.randn(2, samples, channels, space)
        how = saved_for(x, relu=space % 2 == 0)
        for kernel, columns in itertools.product(levels(), (False, True)):
            a, b = (last_channels(x), last_channels(dy)) if columns else (x, dy)
            assert is_equal_in_place(kernel, a, b, how), (samples, space, kernel)


# More columns than a unit of work has values, and every order of magnitude.
LARGE = [
    (3, 70_000),
    (2, 8192, 9),
    (2, 66_000, 1),
    (1, 100_000, 2),
    (3, 1, 100_000),
    (40_000, 3, 5),
]


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_sizes(shape: tuple[int, ...]) -> None:
    """More than 65,536 columns were a division by zero."""
    x, dy = torch.randn(2, *shape)
    how = saved_for(x)
    wanted = compute_all(REFERENCE, x.double(), dy.double(), how)
    near = Near(wanted, bounds(wanted, how, dy))
    for kernel, values in itertools.product(levels(), (x, last_channels(x))):
        assert near(compute_all(kernel, values, dy, how)), kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("space", [1, 2, 67])
def test_every_width_of_halves(dtype: torch.dtype, space: int) -> None:
    """Two vectors at once, with interleaved values, and the remainder."""
    for channels, samples in itertools.product(range(1, 2 * LONGEST), (1, 9)):
        x, dy = torch.randn(2, samples, channels, space).to(dtype)
        how = saved_for(x.float())
        wanted = compute_all(REFERENCE, x.double(), dy.double(), how)
        # Of few values a channel, dx is a difference of these that all but vanishes.
        terms = largest_invstd(how) * 1.5 * largest(dy).double()
        sizes = [*(largest(t).clamp(min=1) for t in wanted[:-1]), terms]
        precision = [1e-6 if i in C_NUMBERS else tolerance(dtype) for i in range(len(sizes))]
        near = Near(wanted, [size * most for size, most in zip(sizes, precision, strict=True)])
        for kernel in levels():
            assert near(compute_all(kernel, x, dy, how)), (channels, samples, kernel)
        assert is_equal_in_place(cpp(), last_channels(x), last_channels(dy), how)


VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "channels of rows": (lambda t: t[:, 3:20], True),
    "channels of columns": (
        lambda t: t.contiguous(memory_format=torch.channels_last)[:, 3:20],
        True,
    ),
    "every second sample": (lambda t: t[::2], True),
    "the same sample": (lambda t: t[:1].expand(4, -1, -1, -1), True),
    "one channel": (lambda t: t[:, 4:5], True),
    "a row of each": (lambda t: t[:, :, 2], False),
    "a column of each": (lambda t: t[..., 2], False),
    "a window": (lambda t: t[..., 1:4, 2:5], False),
    "transposed": (lambda t: t.transpose(2, 3), False),
    "every second channel": (lambda t: t[:, ::2], False),
    "one number": (lambda t: t[:1, :1, :1, :1].expand_as(t), False),
    "negated, not yet": (lambda t: torch._neg_view(t), True),
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(kernel: cpu.CPUKernel, view: str) -> None:
    make, readable = VIEWS[view]
    x, dy, residual = (make(torch.randn(4, 24, 6, 9)) for _ in range(3))
    assert (as_dense(x)[0] is x or x.is_neg()) == readable
    how = saved_for(x.contiguous())
    # Of equal values dx is a difference that vanishes, times 1/sqrt(eps).
    bound = 1e-6 * max(10.0, largest_invstd(how))
    # Gradients and residuals need not lie as the input does.
    other = dy.contiguous(memory_format=torch.channels_last) if dy.dim() == 4 else dy.contiguous()
    for gradient in (dy, other):
        found, wanted = (compute_all(k, x, gradient, how) for k in (kernel, REFERENCE))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=bound)
        assert is_equal_in_place(kernel, x, gradient, how)
    mine, theirs = (normalize(k, x, how, residual) for k in (kernel, REFERENCE))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=bound)


@pytest.mark.parametrize("shape", [(16, 3, 100, 100), (1, 1, 500_001), (64, 300, 4, 4)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_change_nothing(shape: tuple[int, ...], layout: str) -> None:
    """Results are bitwise equal: partial sums depend on sizes alone."""
    x, dy = torch.randn(2, *shape)
    if layout == "channels_last":
        x, dy = last_channels(x), last_channels(dy)
    how = saved_for(x)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compute_all(cpp(), x, dy, how))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


# Of more than 4 MiB, also as halves: rows and lines that are whole cache lines, or begin and end in
# one; rows and lines that are longer than one staging buffer; lines of several samples.
STREAMED = [
    (3, 33, 181, 179),
    (2, 40, 192, 160),
    (1, 1, 2_500_001),
    (75_001, 33),
    (30_001, 80),
    (25_000, 96),
    (401, 6007),
    (800_001, 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", STREAMED, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_streaming_stores(
    kernel: cpu.CPUKernel, dtype: torch.dtype, shape: tuple[int, ...], offset: int
) -> None:
    memory = torch.randn(math.prod(shape) + 1, dtype=dtype)
    assert memory.nbytes > 1 << 22
    x = memory[offset:][: math.prod(shape)].view(shape)
    dim = 2 if len(shape) > 2 else 0
    # Parts of it are written by way of the caches.
    parts = x.split(shape[dim] // 10, dim)
    dy, how = x.flip(0), saved_for(parts[0].double())
    gradients, sums = dy.split(shape[dim] // 10, dim), torch.ones(2 * shape[1]).double()
    y = [normalize(kernel, part, how) for part in parts]
    assert torch.equal(normalize(kernel, x, how), torch.cat(y, dim))
    dx = [backward_elemt(kernel, g, x, how, sums) for g, x in zip(gradients, parts, strict=True)]
    assert torch.equal(backward_elemt(kernel, dy, x, how, sums), torch.cat(dx, dim))
    assert is_equal_in_place(kernel, x, dy, how)
    alone_y, _ = kernel.forward_local(x, NormalizeArgs(EPS))
    apart, _ = kernel.normalize(x, kernel.moments(x), NormalizeArgs(EPS))
    assert torch.equal(alone_y, apart)
