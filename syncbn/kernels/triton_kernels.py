"""The kernels in Triton: what a program does to its share of a tensor.

A tensor is ``[samples, channels, space]``, dense but for gaps between samples, which are a
``stride`` apart. A channels_last one (``LAST``) is a single sample ``[space, channels]``, whose
positions are a ``stride`` apart. A program has a block of channels and some tiles of their values,
``BLOCK_N`` samples of ``BLOCK_S`` positions each. Its arrays are ``[BLOCK_N * BLOCK_S, BLOCK_C]``;
the compiler sees which dimension is dense, and lays threads along it.

Tiles are added up in the compute dtype, around a pivot of the program's own. What is in the result,
and then what programs found, is summed in float64, in the same order every time and never
atomically. Arithmetic on C numbers is float64, and repeated by every program that needs it: some
dozens of operations for each of thousands of values. Offsets are int64.

Names are those of :mod:`syncbn.kernels.transform`; ``here`` says what exists. Calls give arguments
their types, but for "fp64": else a float would be rounded to float32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined"
# fmt: off

import triton
import triton.language as tl

from syncbn.kernels.triton_addresses import channels_of, dense_of, multiple, offsets, size_of, tile
from syncbn.kernels.triton_gates import load_gate, opens, store_gate
from syncbn.kernels.triton_numbers import (
    affine,
    count_a_batch,
    move,
    numbers_of,
    statistics,
    store_count,
    store_sums,
    through_relu,
)
from syncbn.moments import ROUNDING

_ROUNDING = tl.constexpr(ROUNDING)


@triton.jit
def moments(
    x_ptr, sums_ptr, samples, channels, space, x_stride, tiles, splits, count,
    AHEAD: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
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
    values = tl.maximum(size_of(split, samples, space, BLOCK_N, BLOCK_S), 1)
    pivot = tl.sum(first, 0) / values.to(COMPUTE)
    sum_, sum_sq, size = _sums_around(
        pivot, x_ptr, c, split, samples, channels, space, x_stride, tiles, splits,
        LAST, AHEAD, BLOCK_N, BLOCK_S, BLOCK_C, COMPUTE,
    )
    share = 1.0 / size.to(tl.float64)
    off = sum_ * share
    is_far = off * off > 4 * (sum_sq * share - off * off)
    if tl.max(is_far.to(tl.int32), 0) > 0:
        pivot = (pivot + off).to(COMPUTE)
        sum_, sum_sq, size = _sums_around(
            pivot, x_ptr, c, split, samples, channels, space, x_stride, tiles, splits,
            LAST, AHEAD, BLOCK_N, BLOCK_S, BLOCK_C, COMPUTE,
        )
    wide = pivot.to(tl.float64)
    total = sum_ + wide * size
    total_sq = sum_sq + wide * (sum_ + total)
    store_sums(total, total_sq, sums_ptr, None, None, split, channels, c, here_c)
    if splits == 1:
        store_count(count, sums_ptr, channels)


@triton.jit
def normalize(
    x_ptr, residual_ptr, y_ptr, gate_ptr, message_ptr, statistics_ptr, weight_ptr, bias_ptr,
    running_mean_ptr, running_var_ptr, tracked_ptr, eps: "fp64", momentum: "fp64",
    samples, channels, space, x_stride, stride, tiles,
    RELU: tl.constexpr, CUMULATIVE: tl.constexpr, TILES: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Write y of some tiles; the first programs of channels write statistics and averages, too."""
    channels, space = dense_of(channels, space, UNIT, LAST)
    x_stride, stride = multiple(x_stride, UNIT), multiple(stride, UNIT)
    c, here_c, group = channels_of(channels, BLOCK_C)
    count = tl.load(message_ptr + 2 * channels)
    total = numbers_of(message_ptr + c, here_c, ROWS)
    total_sq = numbers_of(message_ptr + channels + c, here_c, ROWS)
    share_of_one = 1.0 / tl.maximum(count, 1.0)
    mean = total * share_of_one
    squares = total_sq - total * mean
    squares = tl.where(squares > _ROUNDING * total_sq, squares, 0.0)
    invstd = tl.rsqrt(squares * share_of_one + eps)
    if group == 0:
        tl.store(statistics_ptr + c, mean, here_c)
        tl.store(statistics_ptr + channels + c, invstd, here_c)
        tl.store(statistics_ptr + 2 * channels, count)
        if count > 1.0:
            share = tl.full((), momentum, tl.float64)
            if CUMULATIVE:
                share = 1.0 / tl.maximum(tl.load(tracked_ptr).to(tl.float64), 1.0)
            unbiased = squares / (count - 1.0)
            move(running_mean_ptr, mean, share, c, here_c)
            move(running_var_ptr, unbiased, share, c, here_c)
            if tracked_ptr is not None and not CUMULATIVE:
                count_a_batch(tracked_ptr)

    pivot, _, scale, shift = affine(mean, invstd, weight_ptr, bias_ptr, c, here_c, COMPUTE)
    for i in range(TILES):
        t = group * TILES + i
        n, s, here = tile(t, c, samples, channels, space, BLOCK_N, BLOCK_S)
        dense = offsets(n, c, s, stride, space, LAST)
        x = tl.load(x_ptr + offsets(n, c, s, x_stride, space, LAST), here, 0.0).to(COMPUTE)
        y = (x - pivot[None, :]) * scale[None, :] + shift[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + dense, here, 0.0).to(COMPUTE)
        if RELU:
            y = tl.where(y <= 0, 0.0, y)
        rounded = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + dense, rounded, here)
        if gate_ptr is not None:
            is_open = opens(rounded, COMPUTE)
            store_gate(
                gate_ptr, is_open, t, tiles, channels, LAST, PACK, BLOCK_N * BLOCK_S, BLOCK_C
            )


@triton.jit
def backward_reduce(
    dy_ptr, gate_ptr, gated_ptr, x_ptr, sums_ptr, statistics_ptr, weight_ptr, bias_ptr,
    dbias_ptr, dweight_ptr, samples, channels, space, dy_stride, x_stride, stride, tiles, splits,
    RELU: tl.constexpr, AHEAD: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Write ``[sum(dy) | sum(dy xhat)]`` of a split; dbias and dweight, if these are given.

    If a gate is, dy counts where that is open, and is written as such; there may be dy itself.
    """
    channels, space = dense_of(channels, space, UNIT, LAST)
    dy_stride, x_stride = multiple(dy_stride, UNIT), multiple(x_stride, UNIT)
    stride = multiple(stride, UNIT)
    c, here_c, split = channels_of(channels, BLOCK_C)
    mean, invstd = statistics(statistics_ptr, channels, c, here_c, ROWS)
    pivot, _, scale, shift = affine(mean, invstd, weight_ptr, bias_ptr, c, here_c, COMPUTE)
    sum_dy = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    sum_dy_xmu = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    for t in tl.range(split, tiles, splits, num_stages=AHEAD + 1):
        n, s, here = tile(t, c, samples, channels, space, BLOCK_N, BLOCK_S)
        x = tl.load(x_ptr + offsets(n, c, s, x_stride, space, LAST), here, 0.0).to(COMPUTE)
        dy = tl.load(dy_ptr + offsets(n, c, s, dy_stride, space, LAST), here, 0.0).to(COMPUTE)
        xmu = x - pivot[None, :]
        if RELU:
            dy = through_relu(dy, xmu, scale, shift)
        if gate_ptr is not None:
            is_open = load_gate(
                gate_ptr, t, tiles, channels, LAST, PACK, BLOCK_N * BLOCK_S, BLOCK_C
            )
            dy = tl.where(is_open, dy, 0.0)
            gated = gated_ptr + offsets(n, c, s, stride, space, LAST)
            tl.store(gated, dy.to(gated_ptr.dtype.element_ty), here)
        sum_dy += dy
        sum_dy_xmu += dy * xmu
    # Read again, rather than kept in registers all the while.
    mean, invstd = statistics(statistics_ptr, channels, c, here_c, ROWS, AGAIN=True)
    rest = mean - mean.to(COMPUTE).to(tl.float64)
    first = tl.sum(sum_dy.to(tl.float64), 0)
    second = (tl.sum(sum_dy_xmu.to(tl.float64), 0) - rest * first) * invstd
    store_sums(first, second, sums_ptr, dbias_ptr, dweight_ptr, split, channels, c, here_c)


@triton.jit
def backward_elemt(
    dy_ptr, x_ptr, dx_ptr, sums_ptr, statistics_ptr, weight_ptr, bias_ptr,
    samples, channels, space, dy_stride, x_stride, stride,
    RELU: tl.constexpr, TILES: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Write dx of some tiles; dx may be dy."""
    channels, space = dense_of(channels, space, UNIT, LAST)
    dy_stride, x_stride = multiple(dy_stride, UNIT), multiple(x_stride, UNIT)
    stride = multiple(stride, UNIT)
    c, here_c, group = channels_of(channels, BLOCK_C)
    mean, invstd = statistics(statistics_ptr, channels, c, here_c, ROWS)
    pivot, rest, scale, shift = affine(mean, invstd, weight_ptr, bias_ptr, c, here_c, COMPUTE)
    share = 1.0 / tl.maximum(tl.load(statistics_ptr + 2 * channels), 1.0)
    slope = invstd * tl.load(sums_ptr + channels + c, here_c, 0.0) * share
    offset = (tl.load(sums_ptr + c, here_c, 0.0) * share - rest * slope).to(COMPUTE)
    slope = slope.to(COMPUTE)
    for i in range(TILES):
        n, s, here = tile(group * TILES + i, c, samples, channels, space, BLOCK_N, BLOCK_S)
        x = tl.load(x_ptr + offsets(n, c, s, x_stride, space, LAST), here, 0.0).to(COMPUTE)
        dy = tl.load(dy_ptr + offsets(n, c, s, dy_stride, space, LAST), here, 0.0).to(COMPUTE)
        xmu = x - pivot[None, :]
        if RELU:
            dy = through_relu(dy, xmu, scale, shift)
        dx = (dy - offset[None, :] - xmu * slope[None, :]) * scale[None, :]
        dense = offsets(n, c, s, stride, space, LAST)
        tl.store(dx_ptr + dense, dx.to(dx_ptr.dtype.element_ty), here)


@triton.jit
def unpack(
    gate_ptr, open_ptr, samples, channels, space, stride, tiles,
    TILES: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Write a byte for each bit of some tiles of a gate."""
    channels, space = dense_of(channels, space, UNIT, LAST)
    stride = multiple(stride, UNIT)
    c, _, group = channels_of(channels, BLOCK_C)
    for i in range(TILES):
        t = group * TILES + i
        n, s, here = tile(t, c, samples, channels, space, BLOCK_N, BLOCK_S)
        is_open = load_gate(gate_ptr, t, tiles, channels, LAST, PACK, BLOCK_N * BLOCK_S, BLOCK_C)
        tl.store(open_ptr + offsets(n, c, s, stride, space, LAST), is_open.to(tl.int8), here)


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
    store_sums(first, second, sums_ptr, dbias_ptr, dweight_ptr, 0, channels, c, here_c)
    if count is not None:
        store_count(count, sums_ptr, channels)


@triton.jit
def _sums_around(
    pivot, x_ptr, c, split, samples, channels, space, x_stride, tiles, splits,
    LAST: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Return the sums of ``x - pivot`` and of its square, float64, and of how many values."""
    sum_ = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    sum_sq = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    size = tl.full((), 0, tl.int32)
    for t in tl.range(split, tiles, splits, num_stages=AHEAD + 1):
        n, s, here = tile(t, c, samples, channels, space, BLOCK_N, BLOCK_S)
        x = tl.load(x_ptr + offsets(n, c, s, x_stride, space, LAST), here, 0.0).to(COMPUTE)
        centred = tl.where(here, x - pivot[None, :], 0.0)
        sum_ += centred
        sum_sq += centred * centred
        size += size_of(t, samples, space, BLOCK_N, BLOCK_S)
    return tl.sum(sum_.to(tl.float64), 0), tl.sum(sum_sq.to(tl.float64), 0), size
