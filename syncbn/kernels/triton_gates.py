"""Which values came through a ReLU, a bit each: a sixteenth of what their output takes.

The bits of 16 bytes of values, which a thread has in a row, are a byte: with fewer bits where types
are wider. Bytes lie in the order of tiles: they mean something to a tensor of the same view alone.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# fmt: off

import triton
import triton.language as tl


@triton.jit
def opens(values, COMPUTE: tl.constexpr):
    """Return where outputs of a ReLU let gradients pass: where they are positive or NaN."""
    return (values.to(COMPUTE) <= 0) == 0


@triton.jit
def store_gate(
    gate_ptr, is_open, t, tiles, channels,
    LAST: tl.constexpr, PACK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Store the bits of tile t, if it exists."""
    bits = is_open.to(tl.int32)
    if LAST:
        packs = tl.reshape(bits, [BLOCK_V, BLOCK_C // PACK, PACK])
        bytes_ = tl.sum(packs << tl.arange(0, PACK)[None, None, :], 2)
    else:
        packs = tl.reshape(bits, [BLOCK_V // PACK, PACK, BLOCK_C])
        bytes_ = tl.sum(packs << tl.arange(0, PACK)[None, :, None], 1)
    at, here = _bytes_of(t, tiles, channels, LAST, PACK, BLOCK_V, BLOCK_C)
    tl.store(gate_ptr + at, bytes_.to(tl.uint8), here)


@triton.jit
def load_gate(
    gate_ptr, t, tiles, channels,
    LAST: tl.constexpr, PACK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Return where values of tile t are open, shape ``[BLOCK_V, BLOCK_C]``."""
    at, here = _bytes_of(t, tiles, channels, LAST, PACK, BLOCK_V, BLOCK_C)
    bytes_ = tl.load(gate_ptr + at, here, 0).to(tl.int32)
    if LAST:
        bits = bytes_[:, :, None] >> tl.arange(0, PACK)[None, None, :]
    else:
        bits = bytes_[:, None, :] >> tl.arange(0, PACK)[None, :, None]
    return (tl.reshape(bits, [BLOCK_V, BLOCK_C]) & 1) != 0


@triton.jit
def _bytes_of(
    t, tiles, channels,
    LAST: tl.constexpr, PACK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Return where the bytes of tile t are, and which exist: all, or none."""
    blocks = tl.cdiv(channels, BLOCK_C).to(tl.int64)
    start = t * blocks + tl.program_id(0) % blocks
    if LAST:
        across: tl.constexpr = BLOCK_C // PACK
        within = tl.arange(0, BLOCK_V)[:, None] * across + tl.arange(0, across)[None, :]
    else:
        along: tl.constexpr = BLOCK_V // PACK
        within = tl.arange(0, along)[:, None] + tl.arange(0, BLOCK_C)[None, :] * along
    size: tl.constexpr = BLOCK_V * BLOCK_C // PACK
    at = start * size + within
    return at, at < tiles * blocks * size
