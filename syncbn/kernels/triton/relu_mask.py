"""The packed mask of a ReLU, ReLU6 or leaky ReLU: one bit per value, set where the derivative is 1.

It takes a sixteenth of the memory of a half output.

Each dense row (the positions of a channel, or the channels of a position) starts a new byte. A byte
has as many bits as 16 bytes have values, which is the vector of a thread.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# fmt: off

import triton
import triton.language as tl

from syncbn.kernels.triton.indexing import positions_in_tile


@triton.jit
def store_relu_mask(
    relu_mask_ptr, unit, n, s, c, samples, channels, space,
    CHANNELS_LAST: tl.constexpr, INT64_OFFSETS: tl.constexpr, PACK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Store the bits of the tile at sample n, position s, channel c."""
    bits = unit.to(tl.int32)
    if CHANNELS_LAST:
        packs = tl.reshape(bits, [BLOCK_N * BLOCK_S, BLOCK_C // PACK, PACK])
        bytes_ = tl.sum(packs << tl.arange(0, PACK)[None, None, :], 2)
    else:
        packs = tl.reshape(bits, [BLOCK_N * BLOCK_S // PACK, PACK, BLOCK_C])
        bytes_ = tl.sum(packs << tl.arange(0, PACK)[None, :, None], 1)
    offset, mask = _byte_offsets(
        n, s, c, samples, channels, space, CHANNELS_LAST, INT64_OFFSETS, PACK, BLOCK_N, BLOCK_S,
        BLOCK_C
    )
    tl.store(relu_mask_ptr + offset, bytes_.to(tl.uint8), mask)


@triton.jit
def load_relu_mask(
    relu_mask_ptr, n, s, c, samples, channels, space,
    CHANNELS_LAST: tl.constexpr, INT64_OFFSETS: tl.constexpr, PACK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Load the mask of a tile, shape ``[BLOCK_N * BLOCK_S, BLOCK_C]``."""
    offset, mask = _byte_offsets(
        n, s, c, samples, channels, space, CHANNELS_LAST, INT64_OFFSETS, PACK, BLOCK_N, BLOCK_S,
        BLOCK_C
    )
    bytes_ = tl.load(relu_mask_ptr + offset, mask, 0).to(tl.int32)
    if CHANNELS_LAST:
        bits = bytes_[:, :, None] >> tl.arange(0, PACK)[None, None, :]
    else:
        bits = bytes_[:, None, :] >> tl.arange(0, PACK)[None, :, None]
    return (tl.reshape(bits, [BLOCK_N * BLOCK_S, BLOCK_C]) & 1) != 0


@triton.jit
def _byte_offsets(
    n, s, c, samples, channels, space,
    CHANNELS_LAST: tl.constexpr, INT64_OFFSETS: tl.constexpr, PACK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Return the offsets of a tile's bytes, and which of them exist."""
    if CHANNELS_LAST:
        row = tl.cdiv(channels, PACK)
        more_s = tl.arange(0, BLOCK_S)[:, None]
        byte = c // PACK + tl.arange(0, BLOCK_C // PACK)[None, :]
        mask = (n + 0 * more_s < samples) & (s + more_s < space) & (byte < row)
        offsets = (more_s.to(tl.int64) if INT64_OFFSETS else more_s) * row
        offset = tl.cast(s, tl.int64) * row + (offsets + byte)
    else:
        row = tl.cdiv(space, PACK)
        tiles_per_sample: tl.constexpr = BLOCK_S // PACK
        more_n, more_s = positions_in_tile(BLOCK_N, tiles_per_sample)
        more_c = tl.arange(0, BLOCK_C)[None, :]
        byte = s // PACK + more_s
        mask = (n + more_n < samples) & (byte < row) & (c + more_c < channels)
        offsets = (more_n.to(tl.int64) if INT64_OFFSETS else more_n) * channels + more_c
        offset = (tl.cast(n, tl.int64) * channels + c) * row + (offsets * row + byte)
    return offset, mask
