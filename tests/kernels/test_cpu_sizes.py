"""The C++ kernels on every small size, on large tensors, any strides, any number of threads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from syncbn.kernels import REFERENCE, cpu
from syncbn.kernels.base import NormalizeArgs, Saved
from syncbn.kernels.coefficients import split_statistics
from syncbn.kernels.layout import as_dense
from tests.kernel_cases import (
    EPS,
    RELU,
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


def largest(t: Tensor) -> Tensor:
    """Return the largest magnitude, zero for an empty tensor."""
    return t.abs().max() if t.numel() else t.new_zeros(())


# Positions of results that are sums over a channel, and of float64 ones.
SUMS = (0, 1, 6, 7)
FLOAT64 = (*SUMS, 5)


def largest_invstd(saved: Saved) -> float:
    """Return the largest 1/sqrt(var + eps) of a forward pass."""
    return float(split_statistics(saved.statistics)[1].max())


def bounds(expected: list[Tensor], saved: Saved, dy: Tensor) -> list[Tensor]:
    """Return the rounding of the largest value of each kind, or of the sum of its terms."""
    # Sums of random values grow as their square root, and now and then all but vanish.
    typical = max(1.0, (dy.numel() / dy.shape[1]) ** 0.5)
    least = [typical if i in SUMS else 1.0 for i in range(len(expected))]
    precision = [1e-6 if i in FLOAT64 else tolerance(dy.dtype) for i in range(len(expected))]
    sizes = [largest(t).clamp(min=m) for t, m in zip(expected, least, strict=True)]
    # Of few values a channel, dx is a difference of these that all but vanishes.
    sizes[-1] = largest_invstd(saved) * 1.5 * largest(dy).double()
    return [p * size for p, size in zip(precision, sizes, strict=True)]


def check(x: Tensor, dy: Tensor) -> None:
    """Compare every instruction set and both layouts with float64, and dx over dy with dx."""
    saved = saved_for(x.float())
    expected = compute_all(REFERENCE, x.double(), dy.double(), saved)
    pairs = zip(expected, bounds(expected, saved, dy), strict=True)
    limits = torch.cat([bound.expand_as(t) for t, bound in pairs])
    layouts: list[Callable[[Tensor], Tensor]] = [Tensor.contiguous, last_channels]
    for kernel, lay_out in itertools.product(levels(), layouts):
        actual = compute_all(kernel, lay_out(x), dy, saved)
        assert ((torch.cat(actual) - torch.cat(expected)).abs() <= limits).all(), (x.shape, kernel)
        with_relu = saved._replace(activation=RELU)
        assert is_equal_in_place(kernel, lay_out(x), lay_out(dy), with_relu), (x.shape, kernel)


# Around the sizes of vectors.
EDGES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 70)
FEW = (1, 2, 3)


def choose_spaces(channels: int) -> Iterable[int]:
    """Return spatial sizes: every one for few channels, few for every number of channels.

    Loops run along one dimension, or over the product of both: each tail occurs with few sizes of
    the other dimension.
    """
    if channels in FEW:
        return range(1, LONGEST + 1)
    return EDGES if channels in EDGES else FEW


@pytest.mark.parametrize("channels", range(1, LONGEST + 1))
def test_every_small_size(channels: int) -> None:
    """Vectors that are full, begun, or less than one; rows, several samples per row, remainders."""
    generator = torch.Generator().manual_seed(channels)
    memory = torch.randn(2, 3 * channels * LONGEST + 16, generator=generator)
    for samples, space in itertools.product((0, 1, 3), choose_spaces(channels)):
        numel = samples * channels * space
        # Not aligned to anything but its own size.
        check(*memory[:, space % 16 :][:, :numel].view(2, samples, channels, space))


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
    check(*torch.randn(2, *shape))


@pytest.mark.parametrize(("dtype", "samples"), [(torch.bfloat16, 1), (torch.float16, 9)], ids=str)
def test_every_width_of_halves(dtype: torch.dtype, samples: int) -> None:
    """Two vectors at once, with interleaved values, and the remainder."""
    widths = [(channels, 1) for channels in range(1, 2 * LONGEST)]
    widths += [(channels, space) for channels in FEW for space in range(2, 2 * LONGEST)]
    for channels, space in widths:
        check(*torch.randn(2, samples, channels, space).to(dtype))


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
    "one value": (lambda t: t[:1, :1, :1, :1].expand_as(t), False),
    "a negated view": (lambda t: torch._neg_view(t), True),
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(kernel: cpu.CPUKernel, view: str) -> None:
    make, readable = VIEWS[view]
    x, dy, residual = (make(torch.randn(4, 24, 6, 9)) for _ in range(3))
    assert (as_dense(x)[0] is x or x.is_neg()) == readable
    saved = saved_for(x.contiguous())
    # Of equal values dx is a difference that vanishes, times 1/sqrt(eps).
    bound = 1e-6 * max(10.0, largest_invstd(saved))
    # Gradients and residuals may have another layout than the input.
    other = dy.contiguous(memory_format=torch.channels_last) if dy.dim() == 4 else dy.contiguous()
    for gradient in (dy, other):
        actual, expected = (compute_all(k, x, gradient, saved) for k in (kernel, REFERENCE))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=bound)
        assert is_equal_in_place(kernel, x, gradient, saved)
    y, expected_y = (normalize(k, x, saved, residual) for k in (kernel, REFERENCE))
    torch.testing.assert_close(y, expected_y, rtol=1e-6, atol=bound)


@pytest.mark.parametrize("shape", [(16, 3, 100, 100), (1, 1, 500_001), (64, 300, 4, 4)], ids=str)
@pytest.mark.parametrize("lay_out", [Tensor.contiguous, last_channels])
def test_threads_change_nothing(
    shape: tuple[int, ...], lay_out: Callable[[Tensor], Tensor]
) -> None:
    """Results are bitwise equal: partial sums depend on sizes alone."""
    x, dy = map(lay_out, torch.randn(2, *shape))
    saved = saved_for(x)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(compute_all(cpp(), x, dy, saved))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# More than 4 MiB, also as halves: rows and planes that are whole cache lines, or begin and end in
# one; rows and planes that are longer than one staging buffer; rows of several samples.
STREAMED = [
    *((3, 33, 181, 179), (2, 40, 192, 160), (1, 1, 2_500_001), (75_001, 33)),
    *((30_001, 80), (25_000, 96), (401, 6007), (800_001, 3)),
]
# Loops of float64 and float16 differ from these by conversions only. They take planes and rows,
# whole cache lines and staged ones.
STREAMED_TYPES = [
    *((shape, dtype) for shape in STREAMED for dtype in (torch.float32, torch.bfloat16)),
    *((STREAMED[i], dtype) for i in (0, 1, 3, 5) for dtype in (torch.float64, torch.float16)),
]


@pytest.mark.parametrize(("shape", "dtype"), STREAMED_TYPES, ids=str)
def test_streaming_stores(
    kernel: cpu.CPUKernel, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    memory = torch.randn(math.prod(shape) + 1, dtype=dtype)
    assert memory.nbytes > 1 << 22
    # Not aligned to vectors.
    x = memory[1:].view(shape)
    dim = 2 if len(shape) > 2 else 0
    # Parts of it are written by way of the caches.
    parts = x.split(shape[dim] // 10, dim)
    dy, saved = x.flip(0), saved_for(parts[0].double())
    gradients, sums = dy.split(shape[dim] // 10, dim), torch.ones(2 * shape[1]).double()
    y = [normalize(kernel, part, saved) for part in parts]
    assert torch.equal(normalize(kernel, x, saved), torch.cat(y, dim))
    dx = [backward_elemt(kernel, g, x, saved, sums) for g, x in zip(gradients, parts, strict=True)]
    assert torch.equal(backward_elemt(kernel, dy, x, saved, sums), torch.cat(dx, dim))
    assert is_equal_in_place(kernel, x, dy, saved)
    local, _ = kernel.forward_local(x, NormalizeArgs(EPS))
    separate, _ = kernel.normalize(x, kernel.moments(x), NormalizeArgs(EPS))
    assert torch.equal(local, separate)
