"""Device code of the four kernels.

A tensor is ``[samples, channels, space]``, with gaps only between samples, which are a
``stride`` apart. A channels_last tensor (``CHANNELS_LAST``) is a single sample
``[space, channels]``, whose positions are a ``stride`` apart. A program handles a block of channels
and some tiles of their values: ``BLOCK_N`` samples of ``BLOCK_S`` positions. Its arrays are
``[BLOCK_N * BLOCK_S, BLOCK_C]``; the compiler finds the dense dimension and lays threads along it.

Tiles are added up in the compute dtype, around a pivot if necessary. The result of a program, and
the combination of programs, is float64, in a fixed order and without atomics. Every program
repeats the per-channel arithmetic, in float64, for thousands of values.

Arguments of a kernel:
    x, dy, residual, y, dx: tensors as above; strides ``x_stride``, ``dy_stride``, and ``stride``.
    moments, statistics, sums: float64 vectors of :mod:`syncbn.kernels.base`.
    relu_mask: packed bits of :mod:`syncbn.kernels.triton.relu_mask`; masked_dy: dy after it.
    partials, counters: workspace of :mod:`syncbn.kernels.triton.reductions`.
    tiles, tiles_per_sample, splits: tiles of a channel, of a sample, programs per channel.
    DIVISIBILITY: power of two that dense sizes and strides are multiples of.
    EVEN: True if no tile reaches past the end. INT64_OFFSETS: True if offsets in a tile need it.
    SAME_STRIDES: True if all strides are equal. TILES: tiles of a program of an elementwise pass.
    NUM_STAGES: pipeline stages of a reduction. PACK: values per byte of the ReLU mask.
    REPLICAS: see :func:`.per_channel.load_per_channel`. PDL: programmatic dependent launch.

"fp64" keeps Triton from rounding a Python float to float32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, name-defined"
# fmt: off

from functools import partial

import triton
import triton.language as tl

from syncbn.kernels.triton.activations import (
    activation_backward,
    apply_activation,
    mask_gradient,
    unit_derivative,
)
from syncbn.kernels.triton.indexing import (
    assume_divisible,
    channel_block,
    load,
    operand_offsets,
    reversed_tile,
    store,
    tile_offset,
    tile_start,
    valid_mask,
    wait_for_previous_launch,
)
from syncbn.kernels.triton.per_channel import (
    load_affine,
    load_per_channel,
    load_statistics,
    update_running_stats,
)
from syncbn.kernels.triton.reductions import combine_partials, sum_centered, sum_rows
from syncbn.kernels.triton.relu_mask import load_relu_mask, store_relu_mask
from syncbn.moments import ROUNDING

_ROUNDING = tl.constexpr(ROUNDING)
# Squared mean over variance from which a second pass is needed.
_MEAN_DOMINATES = tl.constexpr(4.0)
# DIVISIBILITY states their alignment; specializing on it as well would compile more variants.
_SIZES = [
    *("samples", "channels", "space", "x_stride", "dy_stride", "stride"),
    *("tiles", "tiles_per_sample", "splits", "count"),
]
_jit = partial(triton.jit, do_not_specialize_on_alignment=_SIZES)


@_jit
def moments(
    x_ptr, partials_ptr, counters_ptr, moments_ptr,
    samples, channels, space, x_stride, tiles, tiles_per_sample, splits, count,
    NUM_STAGES: tl.constexpr, BLOCK_K: tl.constexpr, DIVISIBILITY: tl.constexpr, EVEN: tl.constexpr,
    INT64_OFFSETS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):
    """Store ``[sum | sum_sq | count]`` of a block of channels.

    Where the mean is more than two standard deviations from zero, the variance would lose digits:
    values are summed again around a pivot. Loading a pivot first would stall every program.
    """
    wait_for_previous_launch(PDL)
    channels, space, x_stride, _, _ = assume_divisible(
        channels, space, x_stride, x_stride, x_stride, DIVISIBILITY, CHANNELS_LAST
    )
    first_c, c, split = channel_block(channels, BLOCK_C)
    mask_c = c < channels
    pivot = tl.zeros([BLOCK_C], COMPUTE)
    sum_, sum_sq, size = sum_centered(
        pivot, False, x_ptr, first_c, c, split, samples, channels, space, x_stride,
        tiles, tiles_per_sample, splits, EVEN, INT64_OFFSETS, CHANNELS_LAST, NUM_STAGES, BLOCK_N,
        BLOCK_S, BLOCK_C, COMPUTE,
    )
    share = 1.0 / tl.maximum(size, 1).to(COMPUTE)
    local_mean = sum_.to(COMPUTE) * share
    variance = sum_sq.to(COMPUTE) * share - local_mean * local_mean
    # Also where squares overflow float32, which they may not do around a pivot.
    is_near = (local_mean * local_mean <= variance * _MEAN_DOMINATES) & (variance < float("inf"))
    mean_dominates = is_near == 0
    if tl.max(mean_dominates.to(tl.int32), 0) > 0:
        pivot = local_mean
        sum_, sum_sq, size = sum_centered(
            pivot, True, x_ptr, first_c, c, split, samples, channels, space, x_stride,
            tiles, tiles_per_sample, splits, EVEN, INT64_OFFSETS, CHANNELS_LAST, NUM_STAGES,
            BLOCK_N, BLOCK_S, BLOCK_C, COMPUTE,
        )
    wide = pivot.to(tl.float64)
    raw = sum_ + wide * size
    raw_sq = sum_sq + wide * (sum_ + raw)
    combine_partials(
        raw, raw_sq, partials_ptr, counters_ptr, moments_ptr, None, None, count,
        split, splits, channels, c, mask_c, BLOCK_K, BLOCK_C,
    )


@_jit
def normalize(
    x_ptr, residual_ptr, y_ptr, relu_mask_ptr, moments_ptr, statistics_ptr, weight_ptr, bias_ptr,
    running_mean_ptr, running_var_ptr, num_batches_ptr, eps: "fp64", momentum: "fp64",
    samples, channels, space, x_stride, stride, tiles, tiles_per_sample,
    ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr, CUMULATIVE: tl.constexpr,
    TILES: tl.constexpr, DIVISIBILITY: tl.constexpr,
    SAME_STRIDES: tl.constexpr, EVEN: tl.constexpr, INT64_OFFSETS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, REPLICAS: tl.constexpr, PACK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):
    """Store y of some tiles; the first program of a block also updates the statistics."""
    wait_for_previous_launch(PDL)
    channels, space, stride, x_stride, _ = assume_divisible(
        channels, space, stride, x_stride, x_stride, DIVISIBILITY, CHANNELS_LAST
    )
    first_c, c, program = channel_block(channels, BLOCK_C)
    mask_c = c < channels
    count = tl.load(moments_ptr + 2 * channels)
    total = load_per_channel(moments_ptr + c, mask_c, REPLICAS)
    total_sq = load_per_channel(moments_ptr + channels + c, mask_c, REPLICAS)
    share_of_one = 1.0 / tl.maximum(count, 1.0)
    mean = total * share_of_one
    squares = total_sq - total * mean
    # A product, which keeps NaN.
    squares *= (squares > total_sq * _ROUNDING).to(tl.float64)
    invstd = tl.rsqrt(squares * share_of_one + eps)
    if program == 0:
        tl.store(statistics_ptr + c, mean, mask_c)
        tl.store(statistics_ptr + channels + c, invstd, mask_c)
        tl.store(statistics_ptr + 2 * channels, count)
        if count > 1.0:
            update_running_stats(
                running_mean_ptr, running_var_ptr, num_batches_ptr, mean, squares / (count - 1.0),
                momentum, c, mask_c, CUMULATIVE,
            )

    pivot, _, scale, shift = load_affine(mean, invstd, weight_ptr, bias_ptr, c, mask_c, COMPUTE)
    offsets, offsets_x, _ = operand_offsets(
        stride, x_stride, x_stride, space, SAME_STRIDES, CHANNELS_LAST, INT64_OFFSETS,
        BLOCK_N, BLOCK_S, BLOCK_C,
    )
    for i in range(TILES):
        t = reversed_tile(program * TILES + i, tiles, TILES)
        n, s = tile_start(t, tiles_per_sample, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        mask = valid_mask(n, s, c, samples, channels, space, BLOCK_N, BLOCK_S)
        offset = tile_offset(n, s, first_c, stride, space, CHANNELS_LAST)
        x_offset = tile_offset(n, s, first_c, x_stride, space, CHANNELS_LAST)
        x = load(x_ptr + x_offset + offsets_x, mask, EVEN, COMPUTE)
        y = (x - pivot[None, :]) * scale[None, :] + shift[None, :]
        if residual_ptr is not None:
            y += load(residual_ptr + offset + offsets, mask, EVEN, COMPUTE)
        y = apply_activation(y, ACTIVATION, NEGATIVE_SLOPE)
        store(y_ptr + offset + offsets, y, mask, EVEN)
        if relu_mask_ptr is not None:
            unit = unit_derivative(y.to(y_ptr.dtype.element_ty).to(COMPUTE), ACTIVATION)
            store_relu_mask(
                relu_mask_ptr, unit, n, s, first_c, samples, channels, space,
                CHANNELS_LAST, INT64_OFFSETS, PACK, BLOCK_N, BLOCK_S, BLOCK_C,
            )


@_jit
def backward_reduce(
    dy_ptr, relu_mask_ptr, masked_dy_ptr, x_ptr, partials_ptr, counters_ptr, sums_ptr, dbias_ptr,
    dweight_ptr, statistics_ptr, weight_ptr, bias_ptr,
    samples, channels, space, dy_stride, x_stride, stride, tiles, tiles_per_sample, splits,
    ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr, NUM_STAGES: tl.constexpr,
    BLOCK_K: tl.constexpr, DIVISIBILITY: tl.constexpr,
    SAME_STRIDES: tl.constexpr, EVEN: tl.constexpr, INT64_OFFSETS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PACK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):
    """Store ``[sum(dy) | sum(dy xhat)]`` of a block of channels, and dbias and dweight.

    With a mask of a residual's ReLU, dy is masked first, and stored to masked_dy unless that is
    None.
    """
    wait_for_previous_launch(PDL)
    channels, space, stride, x_stride, dy_stride = assume_divisible(
        channels, space, stride, x_stride, dy_stride, DIVISIBILITY, CHANNELS_LAST
    )
    first_c, c, split = channel_block(channels, BLOCK_C)
    mask_c = c < channels
    mean, invstd = load_statistics(statistics_ptr, channels, c, mask_c)
    pivot, _, scale, shift = load_affine(mean, invstd, weight_ptr, bias_ptr, c, mask_c, COMPUTE)
    sum_dy = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    sum_dy_xmu = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    offsets, offsets_x, offsets_dy = operand_offsets(
        stride, x_stride, dy_stride, space, SAME_STRIDES, CHANNELS_LAST, INT64_OFFSETS,
        BLOCK_N, BLOCK_S, BLOCK_C,
    )
    for t in tl.range(split, tiles, splits, num_stages=NUM_STAGES):
        n, s = tile_start(t, tiles_per_sample, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        mask = valid_mask(n, s, c, samples, channels, space, BLOCK_N, BLOCK_S)
        x_offset = tile_offset(n, s, first_c, x_stride, space, CHANNELS_LAST)
        dy_offset = tile_offset(n, s, first_c, dy_stride, space, CHANNELS_LAST)
        x = load(x_ptr + x_offset + offsets_x, mask, EVEN, COMPUTE)
        dy = load(dy_ptr + dy_offset + offsets_dy, mask, EVEN, COMPUTE)
        xmu = x - pivot[None, :]
        if relu_mask_ptr is None:
            z = xmu * scale[None, :] + shift[None, :]
            dy = activation_backward(dy, z, ACTIVATION, NEGATIVE_SLOPE)
        else:
            unit = load_relu_mask(
                relu_mask_ptr, n, s, first_c, samples, channels, space,
                CHANNELS_LAST, INT64_OFFSETS, PACK, BLOCK_N, BLOCK_S, BLOCK_C,
            )
            dy = mask_gradient(dy, unit, NEGATIVE_SLOPE)
        if masked_dy_ptr is not None:
            offset = tile_offset(n, s, first_c, stride, space, CHANNELS_LAST)
            store(masked_dy_ptr + offset + offsets, dy, mask, EVEN)
        sum_dy += dy
        sum_dy_xmu += dy * xmu
    # Loaded again instead of kept in registers during the loop.
    mean, invstd = load_statistics(statistics_ptr, channels, c, mask_c, AGAIN=True)
    rest = mean - mean.to(COMPUTE).to(tl.float64)
    first = sum_rows(sum_dy)
    second = (sum_rows(sum_dy_xmu) - rest * first) * invstd
    combine_partials(
        first, second, partials_ptr, counters_ptr, sums_ptr, dbias_ptr, dweight_ptr, None,
        split, splits, channels, c, mask_c, BLOCK_K, BLOCK_C,
    )


@_jit
def backward_elemt(
    dy_ptr, x_ptr, dx_ptr, sums_ptr, statistics_ptr, weight_ptr, bias_ptr,
    samples, channels, space, dy_stride, x_stride, stride, tiles, tiles_per_sample,
    ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr, TILES: tl.constexpr,
    DIVISIBILITY: tl.constexpr, SAME_STRIDES: tl.constexpr,
    EVEN: tl.constexpr, INT64_OFFSETS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    REPLICAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr, PDL: tl.constexpr,
):
    """Store dx of some tiles; dx may be dy."""
    wait_for_previous_launch(PDL)
    channels, space, stride, x_stride, dy_stride = assume_divisible(
        channels, space, stride, x_stride, dy_stride, DIVISIBILITY, CHANNELS_LAST
    )
    first_c, c, program = channel_block(channels, BLOCK_C)
    mask_c = c < channels
    mean = load_per_channel(statistics_ptr + c, mask_c, REPLICAS)
    invstd = load_per_channel(statistics_ptr + channels + c, mask_c, REPLICAS)
    pivot, rest, scale, shift = load_affine(mean, invstd, weight_ptr, bias_ptr, c, mask_c, COMPUTE)
    share = 1.0 / tl.maximum(tl.load(statistics_ptr + 2 * channels), 1.0)
    slope = invstd * load_per_channel(sums_ptr + channels + c, mask_c, REPLICAS) * share
    intercept = load_per_channel(sums_ptr + c, mask_c, REPLICAS) * share - rest * slope
    slope, intercept = slope.to(COMPUTE), intercept.to(COMPUTE)
    offsets, offsets_x, offsets_dy = operand_offsets(
        stride, x_stride, dy_stride, space, SAME_STRIDES, CHANNELS_LAST, INT64_OFFSETS,
        BLOCK_N, BLOCK_S, BLOCK_C,
    )
    for i in range(TILES):
        t = reversed_tile(program * TILES + i, tiles, TILES)
        n, s = tile_start(t, tiles_per_sample, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        mask = valid_mask(n, s, c, samples, channels, space, BLOCK_N, BLOCK_S)
        x_offset = tile_offset(n, s, first_c, x_stride, space, CHANNELS_LAST)
        dy_offset = tile_offset(n, s, first_c, dy_stride, space, CHANNELS_LAST)
        x = load(x_ptr + x_offset + offsets_x, mask, EVEN, COMPUTE)
        dy = load(dy_ptr + dy_offset + offsets_dy, mask, EVEN, COMPUTE)
        xmu = x - pivot[None, :]
        z = xmu * scale[None, :] + shift[None, :]
        dy = activation_backward(dy, z, ACTIVATION, NEGATIVE_SLOPE)
        # One fused form: two products and sums would round before they cancel.
        dx = (dy - (xmu * slope[None, :] + intercept[None, :])) * scale[None, :]
        offset = tile_offset(n, s, first_c, stride, space, CHANNELS_LAST)
        store(dx_ptr + offset + offsets, dx, mask, EVEN)
