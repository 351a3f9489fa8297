"""Per-channel sums of one program, and of all programs that share a channel.

An atomic counter elects the last program of a channel to combine the partial sums, which saves a
launch. No program waits for another, and partial sums are added in a fixed order, whichever program
is last.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# fmt: off

import triton
import triton.language as tl

from syncbn.kernels.triton.indexing import (
    load,
    offsets_in_tile,
    tile_offset,
    tile_size,
    tile_start,
    valid_mask,
)
from syncbn.kernels.triton.per_channel import store_count, store_sums


@triton.jit
def sum_centered(
    pivot, CENTERED: tl.constexpr, x_ptr, first_c, c, split, samples, channels, space, x_stride,
    tiles, tiles_per_sample, splits, EVEN: tl.constexpr, INT64_OFFSETS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Return the sums of ``x - pivot`` and of its square, float64, and the number of values."""
    sum_ = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    sum_sq = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    size = tl.full((), 0, tl.int32)
    offsets = offsets_in_tile(x_stride, space, CHANNELS_LAST, INT64_OFFSETS, BLOCK_N, BLOCK_S,
        BLOCK_C)
    for t in tl.range(split, tiles, splits, num_stages=NUM_STAGES):
        n, s = tile_start(t, tiles_per_sample, CHANNELS_LAST, BLOCK_N, BLOCK_S)
        mask = valid_mask(n, s, c, samples, channels, space, BLOCK_N, BLOCK_S)
        offset = tile_offset(n, s, first_c, x_stride, space, CHANNELS_LAST)
        x = load(x_ptr + offset + offsets, mask, EVEN, COMPUTE)
        if CENTERED:
            x -= pivot[None, :]
            if not EVEN:
                x = tl.where(mask, x, 0.0)
        sum_ += x
        sum_sq += x * x
        size += tile_size(n, s, samples, space, BLOCK_N, BLOCK_S)
    return sum_rows(sum_), sum_rows(sum_sq), size


@triton.jit
def sum_rows(values):
    """Return the sums over rows, float64.

    The two halves are added in the compute dtype: each thread has values of both.
    """
    rows: tl.constexpr = values.shape[0]
    if rows > 1:
        values = tl.sum(tl.reshape(values, [2, rows // 2, values.shape[1]]), 0)
    return tl.sum(values.to(tl.float64), 0)


@triton.jit
def combine_partials(
    first, second, partials_ptr, counters_ptr, sums_ptr, dbias_ptr, dweight_ptr, count,
    split, splits, channels, c, mask_c, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Store two sums per channel, parameter gradients and the count; each but the sums may be None.

    ``partials`` is ``[blocks, splits, 2, BLOCK_C]``, or None if no programs share a channel;
    ``counters`` is zero for each block before and after.
    """
    if partials_ptr is None:
        store_sums(first, second, sums_ptr, dbias_ptr, dweight_ptr, channels, c, mask_c)
        if count is not None:
            store_count(count, sums_ptr, channels)
    else:
        block = tl.program_id(0) % tl.cdiv(channels, BLOCK_C)
        i = tl.arange(0, BLOCK_C)
        parts = partials_ptr + block.to(tl.int64) * splits * 2 * BLOCK_C
        offset = parts + split * 2 * BLOCK_C + i
        tl.store(offset, first)
        tl.store(offset + BLOCK_C, second)
        # All threads must have stored before the counter says so.
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + block, 1, sem="acq_rel") == splits - 1:
            first, second = _sum_partials(parts, i, splits, BLOCK_K, BLOCK_C)
            store_sums(first, second, sums_ptr, dbias_ptr, dweight_ptr, channels, c, mask_c)
            if count is not None:
                store_count(count, sums_ptr, channels)
            tl.store(counters_ptr + block, 0)


@triton.jit
def _sum_partials(parts, i, splits, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    first = tl.zeros([BLOCK_K, BLOCK_C], tl.float64)
    second = tl.zeros([BLOCK_K, BLOCK_C], tl.float64)
    for start in range(0, splits, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[:, None]
        mask = (k < splits) & (i >= 0)[None, :]
        offset = parts + k * 2 * BLOCK_C + i[None, :]
        # Bypass the L1 cache, which is not coherent with other programs.
        first += tl.load(offset, mask, 0.0, cache_modifier=".cg")
        second += tl.load(offset + BLOCK_C, mask, 0.0, cache_modifier=".cg")
    return tl.sum(first, 0), tl.sum(second, 0)
