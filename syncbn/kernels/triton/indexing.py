"""Where a program of :mod:`syncbn.kernels.triton.device` finds its values.

What changes from tile to tile is a scalar; what differs between values is the same in all tiles,
and small: so a loop has one addition of 64 bits for each 16 bytes.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# fmt: off

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait for the launch before, and let the next be prepared, where launches overlap."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def channels_of(channels, BLOCK_C: tl.constexpr):
    """Return this program's first channel, all of them, and its number among their programs."""
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    first = program % blocks * BLOCK_C
    return first, first + tl.arange(0, BLOCK_C), program // blocks


@triton.jit
def last_first(t, tiles, TILES: tl.constexpr):
    """Return tile t from the end: the last that a reduction has read are in the L2 cache."""
    return tl.cdiv(tiles, TILES) * TILES - 1 - t


@triton.jit
def start_of(t, along, LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return the first sample and position of tile t, of which ``along`` lie in a sample."""
    if LAST:
        n, s = t * 0, t * BLOCK_S
    else:
        n, s = t // along * BLOCK_N, t % along * BLOCK_S
    return n, s


@triton.jit
def within(BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return samples and positions of a tile's values, from its first."""
    v = tl.arange(0, BLOCK_N * BLOCK_S)[:, None]
    return v // BLOCK_S, v % BLOCK_S


@triton.jit
def exists(
    n, s, c, samples, channels, space, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Return which values of the tile that starts at sample n, position s, there are."""
    more_n, more_s = within(BLOCK_N, BLOCK_S)
    return (n + more_n < samples) & (s + more_s < space) & (c < channels)[None, :]


@triton.jit
def size_of(n, s, samples, space, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return how many values of a channel are in the tile that starts at sample n, position s."""
    return tl.minimum(BLOCK_N, samples - n) * tl.minimum(BLOCK_S, space - s)


@triton.jit
def multiple(x, UNIT: tl.constexpr):
    """Return x, a multiple of UNIT, so that the compiler sees it, and loads vectors."""
    return x // UNIT * UNIT


@triton.jit
def dense_of(channels, space, UNIT: tl.constexpr, LAST: tl.constexpr):
    """Return channels and space, of which the dense one is a multiple of UNIT."""
    if LAST:
        channels = multiple(channels, UNIT)
    else:
        space = multiple(space, UNIT)
    return channels, space


@triton.jit
def tile_at(n, s, c, stride, space, LAST: tl.constexpr):
    """Return where the tile starts that has sample n, position s and channel c first: scalars."""
    if LAST:
        at = tl.cast(s, tl.int64) * stride + c
    else:
        at = tl.cast(n, tl.int64) * stride + tl.cast(c, tl.int64) * space + s
    return at


@triton.jit
def values_at(
    stride, space, LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Return where the values of a tile are, from its start; 64 bits if they are to be WIDE."""
    n, s = within(BLOCK_N, BLOCK_S)
    c = tl.arange(0, BLOCK_C)[None, :]
    if WIDE:
        n, s, c = n.to(tl.int64), s.to(tl.int64), c.to(tl.int64)
    return s * stride + c if LAST else n * stride + c * space + s


@triton.jit
def read(ptr, here, FULL: tl.constexpr, COMPUTE: tl.constexpr):
    """Return values, zeros where there are none; in FULL tiles there are all."""
    values = tl.load(ptr) if FULL else tl.load(ptr, here, 0.0)
    return values.to(COMPUTE)


@triton.jit
def write(ptr, values, here, FULL: tl.constexpr):
    """Round and store values, where there are any."""
    rounded = values.to(ptr.dtype.element_ty)
    if FULL:
        tl.store(ptr, rounded)
    else:
        tl.store(ptr, rounded, here)
