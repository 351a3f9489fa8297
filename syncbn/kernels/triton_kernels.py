"""The kernels in Triton: what a program does to its share of a tensor.

A tensor is ``[samples, channels, space]``, dense but for gaps between samples, which are a
``stride`` apart. A channels_last one (``LAST``) is a single sample ``[space, channels]``, whose
positions are a ``stride`` apart. A program has a block of channels and some tiles of their values,
``BLOCK_N`` samples of ``BLOCK_S`` positions each. Its arrays are ``[BLOCK_N * BLOCK_S, BLOCK_C]``;
the compiler sees which dimension is dense, and lays threads along it.

Tiles are added up in the compute dtype, around a pivot of the program's own. What is in the result,
and then what programs found, is summed in float64, in the same order every time and never
atomically: results depend on sizes alone. Arithmetic on C numbers is float64, and repeated by every
program that needs it: some dozens of operations for each of thousands of values. Offsets are int64.

Names are those of :mod:`syncbn.kernels.transform`; ``here`` says what exists. Calls give arguments
their types, but for "fp64": else a float would be rounded to float32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined"
# fmt: off

import triton
import triton.language as tl

from syncbn.kernels.triton_addresses import channels_of, dense_of, multiple, offsets, size_of, tile
from syncbn.moments import ROUNDING

_ROUNDING = tl.constexpr(ROUNDING)


@triton.jit
def moments(
    x_ptr, sums_ptr, samples, channels, space, x_stride, tiles, splits, count,
    UNIT: tl.constexpr, LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Write ``[sum | sum_sq]`` of a split of some channels; the count, too, if there is one split.

    The pivot is the mean of the first tile. Where that is more than two standard deviations off
    (padding, say), float32 would lose the variance: values are summed again, around a better one.
    """
    channels, space = dense_of(channels, space, UNIT, LAST)
    x_stride = multiple(x_stride, UNIT)
    c, here_c, split = channels_of(channels, BLOCK_C)
    n, s, here = tile(split, c, samples, channels, space, BLOCK_N, BLOCK_S)
    first = tl.load(x_ptr + offsets(n, c, s, x_stride, space, LAST), here, 0.0).to(COMPUTE)
    pivot = tl.sum(first, 0) / tl.maximum(tl.sum(here.to(COMPUTE), 0), 1.0)
    sum_, sum_sq, size = _sums_around(
        pivot, x_ptr, c, split, samples, channels, space, x_stride, tiles, splits,
        LAST, BLOCK_N, BLOCK_S, BLOCK_C, COMPUTE,
    )
    off = sum_ / size
    is_far = off * off > 4 * (sum_sq / size - off * off)
    if tl.max(is_far.to(tl.int32), 0) > 0:
        pivot = (pivot + off).to(COMPUTE)
        sum_, sum_sq, size = _sums_around(
            pivot, x_ptr, c, split, samples, channels, space, x_stride, tiles, splits,
            LAST, BLOCK_N, BLOCK_S, BLOCK_C, COMPUTE,
        )
    wide = pivot.to(tl.float64)
    total = sum_ + wide * size
    total_sq = sum_sq + wide * (sum_ + total)
    _store_sums(total, total_sq, sums_ptr, None, None, split, channels, c, here_c)
    if splits == 1:
        _store_count(count, sums_ptr, channels)


@triton.jit
def normalize(
    x_ptr, residual_ptr, y_ptr, message_ptr, statistics_ptr, weight_ptr, bias_ptr,
    running_mean_ptr, running_var_ptr, tracked_ptr, eps: "fp64", momentum: "fp64",
    samples, channels, space, x_stride, stride,
    RELU: tl.constexpr, CUMULATIVE: tl.constexpr, TILES: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Write y of some tiles; the first programs of channels write statistics and averages, too."""
    channels, space = dense_of(channels, space, UNIT, LAST)
    x_stride, stride = multiple(x_stride, UNIT), multiple(stride, UNIT)
    c, here_c, group = channels_of(channels, BLOCK_C)
    count = tl.load(message_ptr + 2 * channels)
    total = tl.load(message_ptr + c, here_c, 0.0)
    total_sq = tl.load(message_ptr + channels + c, here_c, 0.0)
    mean = total / tl.maximum(count, 1.0)
    squares = total_sq - total * mean
    squares = squares * (squares > _ROUNDING * total_sq).to(tl.float64)
    invstd = 1.0 / tl.sqrt(squares / tl.maximum(count, 1.0) + eps)
    if group == 0:
        tl.store(statistics_ptr + c, mean, here_c)
        tl.store(statistics_ptr + channels + c, invstd, here_c)
        tl.store(statistics_ptr + 2 * channels, count)
        if count > 1.0:
            share = tl.full((), momentum, tl.float64)
            if CUMULATIVE:
                share = 1.0 / tl.maximum(tl.load(tracked_ptr).to(tl.float64), 1.0)
            unbiased = squares / (count - 1.0)
            _move(running_mean_ptr, mean, share, c, here_c)
            _move(running_var_ptr, unbiased, share, c, here_c)
            if tracked_ptr is not None and not CUMULATIVE:
                _count_a_batch(tracked_ptr)

    pivot, _, scale, shift = _affine(mean, invstd, weight_ptr, bias_ptr, c, here_c, COMPUTE)
    for i in range(TILES):
        n, s, here = tile(group * TILES + i, c, samples, channels, space, BLOCK_N, BLOCK_S)
        dense = offsets(n, c, s, stride, space, LAST)
        x = tl.load(x_ptr + offsets(n, c, s, x_stride, space, LAST), here, 0.0).to(COMPUTE)
        y = (x - pivot[None, :]) * scale[None, :] + shift[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + dense, here, 0.0).to(COMPUTE)
        if RELU:
            y = tl.where(y <= 0, 0.0, y)
        tl.store(y_ptr + dense, y.to(y_ptr.dtype.element_ty), here)


@triton.jit
def backward_reduce(
    dy_ptr, y_ptr, gated_ptr, x_ptr, sums_ptr, statistics_ptr, weight_ptr, bias_ptr,
    dbias_ptr, dweight_ptr, samples, channels, space, dy_stride, x_stride, stride, tiles, splits,
    RELU: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Write ``[sum(dy) | sum(dy xhat)]`` of a split; dbias and dweight, if these are given.

    If the output is, dy counts where that is positive or NaN, and is written as such; there may be
    dy itself.
    """
    channels, space = dense_of(channels, space, UNIT, LAST)
    dy_stride, x_stride = multiple(dy_stride, UNIT), multiple(x_stride, UNIT)
    stride = multiple(stride, UNIT)
    c, here_c, split = channels_of(channels, BLOCK_C)
    mean, invstd = _statistics(statistics_ptr, channels, c, here_c)
    pivot, rest, scale, shift = _affine(mean, invstd, weight_ptr, bias_ptr, c, here_c, COMPUTE)
    sum_dy = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    sum_dy_xmu = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    for t in range(split, tiles, splits):
        n, s, here = tile(t, c, samples, channels, space, BLOCK_N, BLOCK_S)
        x = tl.load(x_ptr + offsets(n, c, s, x_stride, space, LAST), here, 0.0).to(COMPUTE)
        dy = tl.load(dy_ptr + offsets(n, c, s, dy_stride, space, LAST), here, 0.0).to(COMPUTE)
        xmu = x - pivot[None, :]
        if RELU:
            dy = _through_relu(dy, xmu, scale, shift)
        if y_ptr is not None:
            dense = offsets(n, c, s, stride, space, LAST)
            dy = tl.where(tl.load(y_ptr + dense, here, 0.0).to(COMPUTE) <= 0, 0.0, dy)
            tl.store(gated_ptr + dense, dy.to(gated_ptr.dtype.element_ty), here)
        sum_dy += dy
        sum_dy_xmu += dy * xmu
    first = tl.sum(sum_dy.to(tl.float64), 0)
    second = (tl.sum(sum_dy_xmu.to(tl.float64), 0) - rest * first) * invstd
    _store_sums(first, second, sums_ptr, dbias_ptr, dweight_ptr, split, channels, c, here_c)


@triton.jit
def backward_elemt(
    dy_ptr, x_ptr, dx_ptr, sums_ptr, statistics_ptr, weight_ptr, bias_ptr,
    samples, channels, space, dy_stride, x_stride, stride,
    RELU: tl.constexpr, TILES: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Write dx of some tiles; dx may be dy."""
    channels, space = dense_of(channels, space, UNIT, LAST)
    dy_stride, x_stride = multiple(dy_stride, UNIT), multiple(x_stride, UNIT)
    stride = multiple(stride, UNIT)
    c, here_c, group = channels_of(channels, BLOCK_C)
    mean, invstd = _statistics(statistics_ptr, channels, c, here_c)
    pivot, rest, scale, shift = _affine(mean, invstd, weight_ptr, bias_ptr, c, here_c, COMPUTE)
    values = tl.maximum(tl.load(statistics_ptr + 2 * channels), 1.0)
    slope = invstd * tl.load(sums_ptr + channels + c, here_c, 0.0) / values
    offset = (tl.load(sums_ptr + c, here_c, 0.0) / values - rest * slope).to(COMPUTE)
    slope = slope.to(COMPUTE)
    for i in range(TILES):
        n, s, here = tile(group * TILES + i, c, samples, channels, space, BLOCK_N, BLOCK_S)
        x = tl.load(x_ptr + offsets(n, c, s, x_stride, space, LAST), here, 0.0).to(COMPUTE)
        dy = tl.load(dy_ptr + offsets(n, c, s, dy_stride, space, LAST), here, 0.0).to(COMPUTE)
        xmu = x - pivot[None, :]
        if RELU:
            dy = _through_relu(dy, xmu, scale, shift)
        dx = (dy - offset[None, :] - xmu * slope[None, :]) * scale[None, :]
        dense = offsets(n, c, s, stride, space, LAST)
        tl.store(dx_ptr + dense, dx.to(dx_ptr.dtype.element_ty), here)


@triton.jit
def combine(
    splits_ptr, sums_ptr, dbias_ptr, dweight_ptr, channels, splits, count,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Add up the sums of splits; write the count, dbias and dweight, if these are given."""
    c, here_c, _ = channels_of(channels, BLOCK_C)
    first = tl.zeros([BLOCK_C], tl.float64)
    second = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, splits, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        here = (k < splits)[:, None] & here_c[None, :]
        at = splits_ptr + k[:, None].to(tl.int64) * (2 * channels) + c[None, :]
        first += tl.sum(tl.load(at, here, 0.0), 0)
        second += tl.sum(tl.load(at + channels, here, 0.0), 0)
    _store_sums(first, second, sums_ptr, dbias_ptr, dweight_ptr, 0, channels, c, here_c)
    if count is not None:
        _store_count(count, sums_ptr, channels)


@triton.jit
def _sums_around(
    pivot, x_ptr, c, split, samples, channels, space, x_stride, tiles, splits,
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Return the sums of ``x - pivot`` and of its square, float64, and of how many values."""
    sum_ = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    sum_sq = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    size = tl.full((), 0, tl.int32)
    for t in range(split, tiles, splits):
        n, s, here = tile(t, c, samples, channels, space, BLOCK_N, BLOCK_S)
        x = tl.load(x_ptr + offsets(n, c, s, x_stride, space, LAST), here, 0.0).to(COMPUTE)
        centred = tl.where(here, x - pivot[None, :], 0.0)
        sum_ += centred
        sum_sq += centred * centred
        size += size_of(t, samples, space, BLOCK_N, BLOCK_S)
    return tl.sum(sum_.to(tl.float64), 0), tl.sum(sum_sq.to(tl.float64), 0), size


@triton.jit
def _statistics(statistics_ptr, channels, c, here_c):
    """Return mean and invstd."""
    mean = tl.load(statistics_ptr + c, here_c, 0.0)
    return mean, tl.load(statistics_ptr + channels + c, here_c, 0.0)


@triton.jit
def _affine(mean, invstd, weight_ptr, bias_ptr, c, here_c, COMPUTE: tl.constexpr):
    """Return pivot, rest (float64), scale and shift: y = (x - pivot) * scale + shift."""
    pivot = mean.to(COMPUTE)
    rest = mean - pivot.to(tl.float64)
    scale = invstd
    if weight_ptr is not None:
        scale = invstd * tl.load(weight_ptr + c, here_c, 0.0).to(tl.float64)
    shift = -rest * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + c, here_c, 0.0).to(tl.float64)
    return pivot, rest, scale.to(COMPUTE), shift.to(COMPUTE)


@triton.jit
def _through_relu(dy, xmu, scale, shift):
    """Return dy where the output is positive or NaN, else zero."""
    return tl.where(xmu * scale[None, :] + shift[None, :] <= 0, 0.0, dy)


@triton.jit
def _move(running_ptr, batch, share, c, here_c):
    """Move a running average, if there is one, towards a batch."""
    if running_ptr is not None:
        old = tl.load(running_ptr + c, here_c, 0.0).to(tl.float64)
        new = old + (batch - old) * share
        _store_rounded(running_ptr + c, new, here_c)


@triton.jit
def _count_a_batch(tracked_ptr):
    # By one program of all: else every block of channels would count it.
    if tl.program_id(0) == 0:
        tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)


@triton.jit
def _store_sums(first, second, sums_ptr, dbias_ptr, dweight_ptr, split, channels, c, here_c):
    """Store two numbers a channel as a split's, and rounded as gradients of parameters."""
    at = sums_ptr + split * 2 * channels + c
    tl.store(at, first, here_c)
    tl.store(at + channels, second, here_c)
    if dbias_ptr is not None:
        _store_rounded(dbias_ptr + c, first, here_c)
    if dweight_ptr is not None:
        _store_rounded(dweight_ptr + c, second, here_c)


@triton.jit
def _store_rounded(ptr, values, here):
    """Store float64 values as torch rounds them: halves by way of float32."""
    if ptr.dtype.element_ty.primitive_bitwidth == 16:
        values = values.to(tl.float32)
    tl.store(ptr, values.to(ptr.dtype.element_ty), here)


@triton.jit
def _store_count(count, sums_ptr, channels):
    tl.store(sums_ptr + 2 * channels, tl.full((), count, tl.float64))
