"""Offsets and masks of the tiles of :mod:`syncbn.kernels.triton.kernels`.

A 64-bit scalar changes from tile to tile; the offsets within a tile are small and the same for all
tiles. So a loop needs one 64-bit addition per 16 bytes.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# fmt: off

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def wait_for_previous_launch(PDL: tl.constexpr):
    """Wait for the previous launch and let the next one start early, if PDL."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def channel_block(channels, BLOCK_C: tl.constexpr):
    """Return this program's first channel, all its channels, and its index among their programs."""
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    first = program % blocks * BLOCK_C
    return first, first + tl.arange(0, BLOCK_C), program // blocks


@triton.jit
def reversed_tile(t, tiles, TILES: tl.constexpr):
    """Return tile t from the end: the tiles that a reduction loaded last are in the L2 cache."""
    return tl.cdiv(tiles, TILES) * TILES - 1 - t


@triton.jit
def tile_start(t, tiles_per_sample, CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr):
    """Return the first sample and position of tile t."""
    if CHANNELS_LAST:
        n, s = t * 0, t * BLOCK_S
    else:
        n, s = t // tiles_per_sample * BLOCK_N, t % tiles_per_sample * BLOCK_S
    return n, s


@triton.jit
def positions_in_tile(BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return the sample and position of each value, relative to the tile's first."""
    v = tl.arange(0, BLOCK_N * BLOCK_S)[:, None]
    return v // BLOCK_S, v % BLOCK_S


@triton.jit
def valid_mask(
    n, s, c, samples, channels, space, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Return which values of the tile at sample n, position s are inside the tensor."""
    more_n, more_s = positions_in_tile(BLOCK_N, BLOCK_S)
    return (n + more_n < samples) & (s + more_s < space) & (c < channels)[None, :]


@triton.jit
def tile_size(n, s, samples, space, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return the number of values per channel in the tile at sample n, position s."""
    return tl.minimum(BLOCK_N, samples - n) * tl.minimum(BLOCK_S, space - s)


@triton.jit
def assume_divisible(
    channels, space, stride, x_stride, dy_stride, DIVISIBILITY: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Return sizes and strides so that the compiler treats them as multiples and loads vectors.

    Strides and the dense size are multiples of DIVISIBILITY.
    """
    if CHANNELS_LAST:
        channels = channels // DIVISIBILITY * DIVISIBILITY
    else:
        space = space // DIVISIBILITY * DIVISIBILITY
    stride = stride // DIVISIBILITY * DIVISIBILITY
    x_stride = x_stride // DIVISIBILITY * DIVISIBILITY
    dy_stride = dy_stride // DIVISIBILITY * DIVISIBILITY
    return channels, space, stride, x_stride, dy_stride


@triton.jit
def tile_offset(n, s, c, stride, space, CHANNELS_LAST: tl.constexpr):
    """Return the offset of the tile whose first value is at sample n, position s, channel c."""
    if CHANNELS_LAST:
        offset = tl.cast(s, tl.int64) * stride + c
    else:
        offset = tl.cast(n, tl.int64) * stride + tl.cast(c, tl.int64) * space + s
    return offset


@triton.jit
def offsets_in_tile(
    stride, space, CHANNELS_LAST: tl.constexpr, INT64_OFFSETS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Return the offsets of a tile's values from its first."""
    n, s = positions_in_tile(BLOCK_N, BLOCK_S)
    c = tl.arange(0, BLOCK_C)[None, :]
    if INT64_OFFSETS:
        n, s, c = n.to(tl.int64), s.to(tl.int64), c.to(tl.int64)
    return s * stride + c if CHANNELS_LAST else n * stride + c * space + s


@triton.jit
def operand_offsets(
    stride, x_stride, dy_stride, space, SAME_STRIDES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    INT64_OFFSETS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return offsets in a tile for three strides; the same ones if all strides are equal."""
    offsets = offsets_in_tile(
        stride, space, CHANNELS_LAST, INT64_OFFSETS, BLOCK_N, BLOCK_S, BLOCK_C
    )
    x_offsets, dy_offsets = offsets, offsets
    if not SAME_STRIDES:
        x_offsets = offsets_in_tile(
            x_stride, space, CHANNELS_LAST, INT64_OFFSETS, BLOCK_N, BLOCK_S, BLOCK_C
        )
        dy_offsets = offsets_in_tile(
            dy_stride, space, CHANNELS_LAST, INT64_OFFSETS, BLOCK_N, BLOCK_S, BLOCK_C
        )
    return offsets, x_offsets, dy_offsets


@triton.jit
def load(ptr, mask, EVEN: tl.constexpr, COMPUTE: tl.constexpr):
    """Load values, zeros outside the mask."""
    values = tl.load(ptr) if EVEN else tl.load(ptr, mask, 0.0)
    return values.to(COMPUTE)


@triton.jit
def store(ptr, values, mask, EVEN: tl.constexpr):
    """Round and store values inside the mask."""
    rounded = values.to(ptr.dtype.element_ty)
    if EVEN:
        tl.store(ptr, rounded)
    else:
        tl.store(ptr, rounded, mask)
