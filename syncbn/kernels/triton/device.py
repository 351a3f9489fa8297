"""The kernels in Triton: what a program does to its share of a tensor.

A tensor is ``[samples, channels, space]``, dense but for gaps between samples, which are a
``stride`` apart. A channels_last one (``LAST``) is a single sample ``[space, channels]``, whose
positions are a ``stride`` apart. A program has a block of channels and some tiles of their values,
``BLOCK_N`` samples of ``BLOCK_S`` positions each. Its arrays are ``[BLOCK_N * BLOCK_S, BLOCK_C]``;
the compiler sees which dimension is dense, and lays threads along it.

Tiles are added up in the compute dtype, around a pivot if need be; what is in the result, and then
what programs found, in float64, in the same order every time and never atomically. Arithmetic on C
numbers is float64, and repeated by every program that needs it: some dozens of operations for each
of thousands of values.

Names are those of :mod:`syncbn.kernels.coefficients`; ``here`` says what exists. Calls give arguments
their types, but for "fp64": else a float would be rounded to float32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined"
# fmt: off

from functools import partial

import triton
import triton.language as tl

from syncbn.kernels.triton.indexing import (
    begin,
    channels_of,
    dense_of,
    exists,
    last_first,
    multiple,
    read,
    start_of,
    tile_at,
    values_at,
    write,
)
from syncbn.kernels.triton.per_channel import (
    affine,
    move_averages,
    numbers_of,
    statistics,
    through_relu,
)
from syncbn.kernels.triton.reductions import store_totals, summed, sums_around
from syncbn.kernels.triton.relu_mask import load_gate, opens, store_gate
from syncbn.moments import ROUNDING

_ROUNDING = tl.constexpr(ROUNDING)
# Square of a mean over the variance.
_FAR = tl.constexpr(16.0)
# Their alignment is what UNIT says, not one more reason to compile.
_SIZES = [
    *("samples", "channels", "space", "x_stride", "dy_stride", "stride"),
    *("tiles", "along", "splits", "count"),
]
_jit = partial(triton.jit, do_not_specialize_on_alignment=_SIZES)


@_jit
def moments(
    x_ptr, parts_ptr, arrivals_ptr, message_ptr,
    samples, channels, space, x_stride, tiles, along, splits, count,
    AHEAD: tl.constexpr, BLOCK_K: tl.constexpr, UNIT: tl.constexpr, FULL: tl.constexpr,
    WIDE: tl.constexpr, LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):
    """Write ``[sum | sum_sq | count]`` of some channels: of a split, if it is the last to come.

    Where the mean is more than four standard deviations from zero, digits of the variance would be
    lost in rounding: values are summed again, around a pivot. To look for one first would have
    every program wait for memory.
    """
    begin(PDL)
    channels, space = dense_of(channels, space, UNIT, LAST)
    x_stride = multiple(x_stride, UNIT)
    first_c, c, split = channels_of(channels, BLOCK_C)
    here_c = c < channels
    pivot = tl.zeros([BLOCK_C], COMPUTE)
    sum_, sum_sq, size = sums_around(
        pivot, False, x_ptr, first_c, c, split, samples, channels, space, x_stride,
        tiles, along, splits, FULL, WIDE, LAST, AHEAD, BLOCK_N, BLOCK_S, BLOCK_C, COMPUTE,
    )
    share = 1.0 / tl.maximum(size, 1).to(COMPUTE)
    off = sum_.to(COMPUTE) * share
    variance = sum_sq.to(COMPUTE) * share - off * off
    # Also where squares are beyond float32, which around a pivot they may not be.
    is_far = ((off * off <= variance * _FAR) & (variance < float("inf"))) == 0
    if tl.max(is_far.to(tl.int32), 0) > 0:
        pivot = off
        sum_, sum_sq, size = sums_around(
            pivot, True, x_ptr, first_c, c, split, samples, channels, space, x_stride,
            tiles, along, splits, FULL, WIDE, LAST, AHEAD, BLOCK_N, BLOCK_S, BLOCK_C, COMPUTE,
        )
    wide = pivot.to(tl.float64)
    raw = sum_ + wide * size
    raw_sq = sum_sq + wide * (sum_ + raw)
    store_totals(
        raw, raw_sq, parts_ptr, arrivals_ptr, message_ptr, None, None, count,
        split, splits, channels, c, here_c, BLOCK_K, BLOCK_C,
    )


@_jit
def normalize(
    x_ptr, residual_ptr, y_ptr, gate_ptr, message_ptr, statistics_ptr, weight_ptr, bias_ptr,
    running_mean_ptr, running_var_ptr, tracked_ptr, eps: "fp64", momentum: "fp64",
    samples, channels, space, x_stride, stride, tiles, along,
    RELU: tl.constexpr, CUMULATIVE: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr,
    SAME: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, PACK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write y of some tiles; the first programs of channels write statistics and averages, too."""
    begin(PDL)
    channels, space = dense_of(channels, space, UNIT, LAST)
    x_stride, stride = multiple(x_stride, UNIT), multiple(stride, UNIT)
    first_c, c, group = channels_of(channels, BLOCK_C)
    here_c = c < channels
    count = tl.load(message_ptr + 2 * channels)
    total = numbers_of(message_ptr + c, here_c, ROWS)
    total_sq = numbers_of(message_ptr + channels + c, here_c, ROWS)
    share_of_one = 1.0 / tl.maximum(count, 1.0)
    mean = total * share_of_one
    squares = total_sq - total * mean
    # By a product, which keeps NaN.
    squares *= (squares > total_sq * _ROUNDING).to(tl.float64)
    invstd = tl.rsqrt(squares * share_of_one + eps)
    if group == 0:
        tl.store(statistics_ptr + c, mean, here_c)
        tl.store(statistics_ptr + channels + c, invstd, here_c)
        tl.store(statistics_ptr + 2 * channels, count)
        if count > 1.0:
            move_averages(
                running_mean_ptr, running_var_ptr, tracked_ptr, mean, squares / (count - 1.0),
                momentum, c, here_c, CUMULATIVE,
            )

    pivot, _, scale, shift = affine(mean, invstd, weight_ptr, bias_ptr, c, here_c, COMPUTE)
    more = values_at(stride, space, LAST, WIDE, BLOCK_N, BLOCK_S, BLOCK_C)
    more_x = more
    if not SAME:
        more_x = values_at(x_stride, space, LAST, WIDE, BLOCK_N, BLOCK_S, BLOCK_C)
    for i in range(TILES):
        n, s = start_of(last_first(group * TILES + i, tiles, TILES), along, LAST, BLOCK_N, BLOCK_S)
        here = exists(n, s, c, samples, channels, space, BLOCK_N, BLOCK_S)
        at = tile_at(n, s, first_c, stride, space, LAST)
        x_at = tile_at(n, s, first_c, x_stride, space, LAST)
        x = read(x_ptr + x_at + more_x, here, FULL, COMPUTE)
        y = (x - pivot[None, :]) * scale[None, :] + shift[None, :]
        if residual_ptr is not None:
            y += read(residual_ptr + at + more, here, FULL, COMPUTE)
        if RELU:
            y = tl.where(y <= 0, 0.0, y)
        write(y_ptr + at + more, y, here, FULL)
        if gate_ptr is not None:
            is_open = opens(y.to(y_ptr.dtype.element_ty), COMPUTE)
            store_gate(
                gate_ptr, is_open, n, s, first_c, samples, channels, space,
                LAST, WIDE, PACK, BLOCK_N, BLOCK_S, BLOCK_C,
            )


@_jit
def backward_reduce(
    dy_ptr, gate_ptr, gated_ptr, x_ptr, parts_ptr, arrivals_ptr, sums_ptr, dbias_ptr, dweight_ptr,
    statistics_ptr, weight_ptr, bias_ptr,
    samples, channels, space, dy_stride, x_stride, stride, tiles, along, splits,
    RELU: tl.constexpr, AHEAD: tl.constexpr, BLOCK_K: tl.constexpr, UNIT: tl.constexpr,
    SAME: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr,
    PACK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr, PDL: tl.constexpr,
):
    """Write ``[sum(dy) | sum(dy xhat)]`` as moments does; dbias and dweight, if these are given.

    If a gate is, dy counts where that is open, and may be written as such: over dy, say.
    """
    begin(PDL)
    channels, space = dense_of(channels, space, UNIT, LAST)
    dy_stride, x_stride = multiple(dy_stride, UNIT), multiple(x_stride, UNIT)
    stride = multiple(stride, UNIT)
    first_c, c, split = channels_of(channels, BLOCK_C)
    here_c = c < channels
    mean, invstd = statistics(statistics_ptr, channels, c, here_c)
    pivot, _, scale, shift = affine(mean, invstd, weight_ptr, bias_ptr, c, here_c, COMPUTE)
    sum_dy = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    sum_dy_xmu = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    more = values_at(stride, space, LAST, WIDE, BLOCK_N, BLOCK_S, BLOCK_C)
    more_x, more_dy = more, more
    if not SAME:
        more_x = values_at(x_stride, space, LAST, WIDE, BLOCK_N, BLOCK_S, BLOCK_C)
        more_dy = values_at(dy_stride, space, LAST, WIDE, BLOCK_N, BLOCK_S, BLOCK_C)
    for t in tl.range(split, tiles, splits, num_stages=AHEAD + 1):
        n, s = start_of(t, along, LAST, BLOCK_N, BLOCK_S)
        here = exists(n, s, c, samples, channels, space, BLOCK_N, BLOCK_S)
        x_at = tile_at(n, s, first_c, x_stride, space, LAST)
        dy_at = tile_at(n, s, first_c, dy_stride, space, LAST)
        x = read(x_ptr + x_at + more_x, here, FULL, COMPUTE)
        dy = read(dy_ptr + dy_at + more_dy, here, FULL, COMPUTE)
        xmu = x - pivot[None, :]
        if RELU:
            dy = through_relu(dy, xmu, scale, shift)
        if gate_ptr is not None:
            is_open = load_gate(
                gate_ptr, n, s, first_c, samples, channels, space,
                LAST, WIDE, PACK, BLOCK_N, BLOCK_S, BLOCK_C,
            )
            dy = tl.where(is_open, dy, 0.0)
        if gated_ptr is not None:
            at = tile_at(n, s, first_c, stride, space, LAST)
            write(gated_ptr + at + more, dy, here, FULL)
        sum_dy += dy
        sum_dy_xmu += dy * xmu
    # Read again, rather than kept in registers all the while.
    mean, invstd = statistics(statistics_ptr, channels, c, here_c, AGAIN=True)
    rest = mean - mean.to(COMPUTE).to(tl.float64)
    first = summed(sum_dy)
    second = (summed(sum_dy_xmu) - rest * first) * invstd
    store_totals(
        first, second, parts_ptr, arrivals_ptr, sums_ptr, dbias_ptr, dweight_ptr, None,
        split, splits, channels, c, here_c, BLOCK_K, BLOCK_C,
    )


@_jit
def backward_elemt(
    dy_ptr, x_ptr, dx_ptr, sums_ptr, statistics_ptr, weight_ptr, bias_ptr,
    samples, channels, space, dy_stride, x_stride, stride, tiles, along,
    RELU: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr, SAME: tl.constexpr,
    FULL: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write dx of some tiles; dx may be dy."""
    begin(PDL)
    channels, space = dense_of(channels, space, UNIT, LAST)
    dy_stride, x_stride = multiple(dy_stride, UNIT), multiple(x_stride, UNIT)
    stride = multiple(stride, UNIT)
    first_c, c, group = channels_of(channels, BLOCK_C)
    here_c = c < channels
    mean = numbers_of(statistics_ptr + c, here_c, ROWS)
    invstd = numbers_of(statistics_ptr + channels + c, here_c, ROWS)
    pivot, rest, scale, shift = affine(mean, invstd, weight_ptr, bias_ptr, c, here_c, COMPUTE)
    share = 1.0 / tl.maximum(tl.load(statistics_ptr + 2 * channels), 1.0)
    slope = invstd * numbers_of(sums_ptr + channels + c, here_c, ROWS) * share
    offset = numbers_of(sums_ptr + c, here_c, ROWS) * share - rest * slope
    slope, offset = slope.to(COMPUTE), offset.to(COMPUTE)
    more = values_at(stride, space, LAST, WIDE, BLOCK_N, BLOCK_S, BLOCK_C)
    more_x, more_dy = more, more
    if not SAME:
        more_x = values_at(x_stride, space, LAST, WIDE, BLOCK_N, BLOCK_S, BLOCK_C)
        more_dy = values_at(dy_stride, space, LAST, WIDE, BLOCK_N, BLOCK_S, BLOCK_C)
    for i in range(TILES):
        n, s = start_of(last_first(group * TILES + i, tiles, TILES), along, LAST, BLOCK_N, BLOCK_S)
        here = exists(n, s, c, samples, channels, space, BLOCK_N, BLOCK_S)
        x_at = tile_at(n, s, first_c, x_stride, space, LAST)
        dy_at = tile_at(n, s, first_c, dy_stride, space, LAST)
        x = read(x_ptr + x_at + more_x, here, FULL, COMPUTE)
        dy = read(dy_ptr + dy_at + more_dy, here, FULL, COMPUTE)
        xmu = x - pivot[None, :]
        if RELU:
            dy = through_relu(dy, xmu, scale, shift)
        # Not two multiplications and additions, which round before they cancel.
        dx = (dy - (xmu * slope[None, :] + offset[None, :])) * scale[None, :]
        at = tile_at(n, s, first_c, stride, space, LAST)
        write(dx_ptr + at + more, dx, here, FULL)


@_jit
def through_gate(
    dy_ptr, gate_ptr, gated_ptr,
    samples, channels, space, dy_stride, stride, along,
    TILES: tl.constexpr, UNIT: tl.constexpr, SAME: tl.constexpr, FULL: tl.constexpr,
    WIDE: tl.constexpr, LAST: tl.constexpr, PACK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):
    """Write dy of some tiles where a gate is open, else zero; without dy, a byte for each value."""
    begin(PDL)
    channels, space = dense_of(channels, space, UNIT, LAST)
    dy_stride, stride = multiple(dy_stride, UNIT), multiple(stride, UNIT)
    first_c, c, group = channels_of(channels, BLOCK_C)
    more = values_at(stride, space, LAST, WIDE, BLOCK_N, BLOCK_S, BLOCK_C)
    more_dy = more
    if not SAME:
        more_dy = values_at(dy_stride, space, LAST, WIDE, BLOCK_N, BLOCK_S, BLOCK_C)
    # From the first tile to the last, which backward_elemt reads first.
    for i in range(TILES):
        n, s = start_of(group * TILES + i, along, LAST, BLOCK_N, BLOCK_S)
        here = exists(n, s, c, samples, channels, space, BLOCK_N, BLOCK_S)
        gated = load_gate(
            gate_ptr, n, s, first_c, samples, channels, space,
            LAST, WIDE, PACK, BLOCK_N, BLOCK_S, BLOCK_C,
        )
        if dy_ptr is not None:
            dy_at = tile_at(n, s, first_c, dy_stride, space, LAST)
            gated = tl.where(gated, read(dy_ptr + dy_at + more_dy, here, FULL, COMPUTE), 0.0)
        at = tile_at(n, s, first_c, stride, space, LAST)
        write(gated_ptr + at + more, gated, here, FULL)
