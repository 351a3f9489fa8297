"""Where a program of :mod:`syncbn.kernels.triton_kernels` finds its values."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# fmt: off

import triton
import triton.language as tl


@triton.jit
def channels_of(channels, BLOCK_C: tl.constexpr):
    """Return the channels of this program, which exist, and its number among their programs."""
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < channels, program // blocks


@triton.jit
def tile(t, c, samples, channels, space, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return the samples and positions of tile t, and which of its values exist."""
    along = tl.cdiv(space, BLOCK_S)
    v = tl.arange(0, BLOCK_N * BLOCK_S)
    n = (t // along * BLOCK_N + v // BLOCK_S)[:, None]
    s = (t % along * BLOCK_S + v % BLOCK_S)[:, None]
    return n, s, (n < samples) & (s < space) & (c < channels)[None, :]


@triton.jit
def size_of(t, samples, space, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return how many values of a channel are in tile t."""
    along = tl.cdiv(space, BLOCK_S)
    n, s = t // along * BLOCK_N, t % along * BLOCK_S
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
def offsets(n, c, s, stride, space, LAST: tl.constexpr):
    """Return where the values of a tile are."""
    if LAST:
        offsets = s.to(tl.int64) * stride + c[None, :]
    else:
        offsets = n.to(tl.int64) * stride + c[None, :].to(tl.int64) * space + s
    return offsets
