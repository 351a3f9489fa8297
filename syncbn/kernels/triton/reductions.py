"""Sums over the values of a channel: those of a program, and those of all that share it.

Of programs that share channels, the last to come adds up what all have found. Others are not waited
for, and which is the last does not matter: parts are added in their order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# fmt: off

import triton
import triton.language as tl

from syncbn.kernels.triton.indexing import exists, read, size_of, start_of, tile_at, values_at
from syncbn.kernels.triton.per_channel import store_count, store_sums


@triton.jit
def sums_around(
    pivot, CENTRED: tl.constexpr, x_ptr, first_c, c, split, samples, channels, space, x_stride,
    tiles, along, splits, FULL: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Return the sums of ``x - pivot`` and of its square, float64, and of how many values."""
    sum_ = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    sum_sq = tl.zeros([BLOCK_N * BLOCK_S, BLOCK_C], COMPUTE)
    size = tl.full((), 0, tl.int32)
    more = values_at(x_stride, space, LAST, WIDE, BLOCK_N, BLOCK_S, BLOCK_C)
    for t in tl.range(split, tiles, splits, num_stages=AHEAD + 1):
        n, s = start_of(t, along, LAST, BLOCK_N, BLOCK_S)
        here = exists(n, s, c, samples, channels, space, BLOCK_N, BLOCK_S)
        at = tile_at(n, s, first_c, x_stride, space, LAST)
        x = read(x_ptr + at + more, here, FULL, COMPUTE)
        if CENTRED:
            x -= pivot[None, :]
            if not FULL:
                x = tl.where(here, x, 0.0)
        sum_ += x
        sum_sq += x * x
        size += size_of(n, s, samples, space, BLOCK_N, BLOCK_S)
    return summed(sum_), summed(sum_sq), size


@triton.jit
def summed(values):
    """Return the sums over rows, float64.

    The halves are added as they are: each thread has values of both.
    """
    rows: tl.constexpr = values.shape[0]
    if rows > 1:
        values = tl.sum(tl.reshape(values, [2, rows // 2, values.shape[1]]), 0)
    return tl.sum(values.to(tl.float64), 0)


@triton.jit
def store_totals(
    first, second, parts_ptr, arrivals_ptr, sums_ptr, dbias_ptr, dweight_ptr, count,
    split, splits, channels, c, here_c, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Store two sums a channel; and as gradients of parameters, and with the count, if these are.

    ``parts`` is ``[blocks, splits, 2, BLOCK_C]``, or None where programs share no channels;
    ``arrivals`` has zeros by block, and is left so.
    """
    if parts_ptr is None:
        store_sums(first, second, sums_ptr, dbias_ptr, dweight_ptr, channels, c, here_c)
        if count is not None:
            store_count(count, sums_ptr, channels)
    else:
        block = tl.program_id(0) % tl.cdiv(channels, BLOCK_C)
        i = tl.arange(0, BLOCK_C)
        parts = parts_ptr + block.to(tl.int64) * splits * 2 * BLOCK_C
        at = parts + split * 2 * BLOCK_C + i
        tl.store(at, first)
        tl.store(at + BLOCK_C, second)
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + block, 1, sem="acq_rel") == splits - 1:
            first, second = _totals(parts, i, splits, BLOCK_K, BLOCK_C)
            store_sums(first, second, sums_ptr, dbias_ptr, dweight_ptr, channels, c, here_c)
            if count is not None:
                store_count(count, sums_ptr, channels)
            tl.store(arrivals_ptr + block, 0)


@triton.jit
def _totals(parts, i, splits, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    first = tl.zeros([BLOCK_K, BLOCK_C], tl.float64)
    second = tl.zeros([BLOCK_K, BLOCK_C], tl.float64)
    for start in range(0, splits, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[:, None]
        here = (k < splits) & (i >= 0)[None, :]
        at = parts + k * 2 * BLOCK_C + i[None, :]
        # Past the L1 cache, which knows nothing of the other programs.
        first += tl.load(at, here, 0.0, cache_modifier=".cg")
        second += tl.load(at + BLOCK_C, here, 0.0, cache_modifier=".cg")
    return tl.sum(first, 0), tl.sum(second, 0)
