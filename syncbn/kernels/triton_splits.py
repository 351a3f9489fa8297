"""Sums of channels that several programs share: the last to come adds up what all have found.

Others are not waited for, and which is the last does not matter: parts are added in their order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# fmt: off

import triton
import triton.language as tl

from syncbn.kernels.triton_numbers import store_count, store_sums


@triton.jit
def store_totals(
    first, second, parts_ptr, arrivals_ptr, sums_ptr, dbias_ptr, dweight_ptr, count,
    split, splits, channels, c, here_c, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Store two sums a channel; and as gradients of parameters, and with the count, if these are.

    ``parts`` is ``[blocks, splits, 2, BLOCK_C]``; ``arrivals`` has zeros by block, and is left so.
    """
    if splits == 1:
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
