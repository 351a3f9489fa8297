"""Which values came through a ReLU, a bit each: a sixteenth of what their output takes.

Rows of what is dense, positions of a channel or channels of a position, have bytes of their own, as
many bits in each as 16 bytes have values: what a thread has in a row.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# fmt: off

import triton
import triton.language as tl

from syncbn.kernels.triton.indexing import within


@triton.jit
def opens(values, COMPUTE: tl.constexpr):
    """Return where outputs of a ReLU let gradients pass: where they are positive or NaN."""
    return (values.to(COMPUTE) <= 0) == 0


@triton.jit
def store_gate(
    gate_ptr, is_open, n, s, c, samples, channels, space,
    LAST: tl.constexpr, WIDE: tl.constexpr, PACK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Store the bits of the tile that has sample n, position s and channel c first."""
    bits = is_open.to(tl.int32)
    if LAST:
        packs = tl.reshape(bits, [BLOCK_N * BLOCK_S, BLOCK_C // PACK, PACK])
        bytes_ = tl.sum(packs << tl.arange(0, PACK)[None, None, :], 2)
    else:
        packs = tl.reshape(bits, [BLOCK_N * BLOCK_S // PACK, PACK, BLOCK_C])
        bytes_ = tl.sum(packs << tl.arange(0, PACK)[None, :, None], 1)
    at, here = _bytes_at(
        n, s, c, samples, channels, space, LAST, WIDE, PACK, BLOCK_N, BLOCK_S, BLOCK_C
    )
    tl.store(gate_ptr + at, bytes_.to(tl.uint8), here)


@triton.jit
def load_gate(
    gate_ptr, n, s, c, samples, channels, space,
    LAST: tl.constexpr, WIDE: tl.constexpr, PACK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Return where values of a tile are open, shape ``[BLOCK_N * BLOCK_S, BLOCK_C]``."""
    at, here = _bytes_at(
        n, s, c, samples, channels, space, LAST, WIDE, PACK, BLOCK_N, BLOCK_S, BLOCK_C
    )
    bytes_ = tl.load(gate_ptr + at, here, 0).to(tl.int32)
    if LAST:
        bits = bytes_[:, :, None] >> tl.arange(0, PACK)[None, None, :]
    else:
        bits = bytes_[:, None, :] >> tl.arange(0, PACK)[None, :, None]
    return (tl.reshape(bits, [BLOCK_N * BLOCK_S, BLOCK_C]) & 1) != 0


@triton.jit
def _bytes_at(
    n, s, c, samples, channels, space,
    LAST: tl.constexpr, WIDE: tl.constexpr, PACK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Return where the bytes of a tile are, and which there are."""
    if LAST:
        row = tl.cdiv(channels, PACK)
        more_s = tl.arange(0, BLOCK_S)[:, None]
        byte = c // PACK + tl.arange(0, BLOCK_C // PACK)[None, :]
        here = (n + 0 * more_s < samples) & (s + more_s < space) & (byte < row)
        more = (more_s.to(tl.int64) if WIDE else more_s) * row
        at = tl.cast(s, tl.int64) * row + (more + byte)
    else:
        row = tl.cdiv(space, PACK)
        along: tl.constexpr = BLOCK_S // PACK
        more_n, more_s = within(BLOCK_N, along)
        more_c = tl.arange(0, BLOCK_C)[None, :]
        byte = s // PACK + more_s
        here = (n + more_n < samples) & (byte < row) & (c + more_c < channels)
        more = (more_n.to(tl.int64) if WIDE else more_n) * channels + more_c
        at = (tl.cast(n, tl.int64) * channels + c) * row + (more * row + byte)
    return at, here
