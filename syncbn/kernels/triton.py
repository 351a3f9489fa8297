"""The kernels on CUDA, in Triton: how programs share a tensor, and what they are told.

Three launches forward, three backward: sums of splits, their sum, and the elementwise pass, which
does the arithmetic on C numbers by the way. Where a channel needs no splitting, there are two.
Nothing waits for the device, and memory is that of the current stream.

With ``TRITON_INTERPRET=1`` in the environment before this is imported, kernels run in Triton's
interpreter, which takes tensors of the CPU: slowly, and with the same arithmetic.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version
from triton import next_power_of_2
from triton.runtime.interpreter import InterpretedFunction

from syncbn.kernels import reference, triton_kernels
from syncbn.kernels.samples import Samples, alike, empty_like, readable
from syncbn.kernels.transform import Forward, Running, Transform, Wanted

IS_INTERPRETED = isinstance(triton_kernels.combine, InterpretedFunction)
_COMPUTE = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
# Of GPUs that Triton compiles for.
_LEAST_CAPABILITY = (8, 0)
# Values of a tile, and of a warp of those that share it: 16 a thread.
_TILE, _OF_A_WARP = 4096, 512
# Channels of a tile where these are dense: 128 bytes of a half type.
_DENSE_CHANNELS = 64
# Of blocks of dense positions, but where there are fewer.
_SHORTEST, _LONGEST = 64, 1024
# Into how many programs a reduction is split: several for each multiprocessor of a large GPU, and
# the same on any, for results to be the same.
_PROGRAMS = 512
# Numbers that a program adds up at a time, and at most how many of those of a channel.
_COMBINED, _TOGETHER = 2048, 256
# Where there are many more programs than that, each takes several tiles of an elementwise pass.
_MANY, _TILES = 4 * _PROGRAMS, 4


class Tiles(NamedTuple):
    """How programs share a tensor; see :mod:`syncbn.kernels.triton_kernels`.

    Attributes:
        size: samples, channels and space.
        constants: of all kernels.
        blocks: of channels.
        number: of tiles that a channel has.
    """

    size: tuple[int, int, int]
    constants: dict[str, Any]
    blocks: int
    number: int

    def unit(self, *strides: int) -> int:
        """Return the power of two, 16 at most, that all rows of what is dense are multiples of."""
        _, channels, space = self.size
        return math.gcd(16, channels if self.constants["LAST"] else space, *strides)

    @property
    def splits(self) -> int:
        """In how many parts a channel is summed."""
        return min(self.number, _cdiv(_PROGRAMS, self.blocks))

    @property
    def each(self) -> int:
        """How many tiles a program of an elementwise pass takes."""
        return _TILES if self.blocks * self.number > _MANY else 1

    @property
    def programs(self) -> int:
        """Programs of an elementwise pass."""
        return self.blocks * _cdiv(self.number, self.each)


def why_not(x: Tensor) -> str | None:
    """Return what of x these kernels do not serve; None if they serve it."""
    if x.device.type != ("cpu" if IS_INTERPRETED else "cuda"):
        return f"does not serve {x.device.type!r} tensors"
    if x.dtype not in _COMPUTE:
        return f"does not serve {x.dtype}"
    if x.numel() >= 2**31 and x.numel() >= 2**31 * x.shape[1]:
        return "does not serve 2^31 values a channel"
    if x.device.type == "cuda" and _capability(x.device.index) < _LEAST_CAPABILITY:
        return f"does not serve GPUs of a capability below {_LEAST_CAPABILITY}"
    return None


def moments(x: Tensor) -> Tensor:
    """See :func:`syncbn.kernels.reference.moments`."""
    x, samples = readable(x)
    tiles = _tiles(samples, x.dtype)
    found = x.new_empty(2 * samples.channels + 1, dtype=torch.float64)
    count = samples.batch * samples.space
    parts = _parts(found, tiles)
    numbers = (*tiles.size, samples.stride, tiles.number, tiles.splits, count)
    _run(
        triton_kernels.moments,
        tiles.blocks * tiles.splits,
        *(x, parts, *numbers),
        UNIT=tiles.unit(samples.stride),
        **tiles.constants,
    )
    if parts is not found:
        _combine(parts, found, tiles, count=count)
    return found


def normalize(
    x: Tensor, message: Tensor, how: Forward, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`syncbn.kernels.reference.normalize`."""
    x, samples = readable(x)
    tiles = _tiles(samples, x.dtype)
    running = how.running or Running(None, None, None, 0.0)
    if not _can_move(running, x):
        reference.move_running(message, running)
        running = Running(None, None, None, 0.0)
    cumulative = running.momentum is None and running.tracked is not None
    if running.tracked is not None and cumulative:
        # By itself: all programs read what one of them would write.
        running.tracked.add_(message[-1] > 1)
    added = None if residual is None else _dense(residual, x, samples)
    statistics, y = torch.empty_like(message), empty_like(x, samples)
    _run(
        triton_kernels.normalize,
        tiles.programs,
        *(x, added, y, message, statistics, _dense_numbers(how.weight), _dense_numbers(how.bias)),
        *(*running[:3], how.eps, running.momentum or 0.0),
        *(*tiles.size, samples.stride, samples.dense_stride),
        UNIT=tiles.unit(samples.stride, samples.dense_stride),
        RELU=how.relu,
        CUMULATIVE=cumulative,
        TILES=tiles.each,
        **tiles.constants,
    )
    # As a call of torch would: autograd must notice if it still needs what was there.
    increment_version([t for t in running[:3] if t is not None])
    return y, statistics


def backward_reduce(
    dy: Tensor, x: Tensor, transform: Transform, wanted: Wanted = (None, None)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`syncbn.kernels.reference.backward_reduce`."""
    return _reduce(dy, None, x, transform, wanted)[1:]


def backward_reduce_gated(
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    transform: Transform,
    wanted: Wanted = (None, None),
    may_overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :meth:`syncbn.kernels.gated.Gated.backward_reduce_gated`."""
    return _reduce(dy, y, x, transform, wanted, may_overwrite)


def _reduce(
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    transform: Transform,
    wanted: Wanted,
    may_overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return what comes through the ReLU of y, or dy, and :func:`backward_reduce` of it."""
    x, samples = readable(x)
    dy, dy_stride = alike(dy, x, samples)
    tiles = _tiles(samples, x.dtype)
    gated, read = dy, None
    if y is not None:
        read = _dense(y, x, samples)
        over = may_overwrite and dy_stride == samples.dense_stride
        gated = dy if over else empty_like(x, samples)
    sums = x.new_empty(2 * samples.channels, dtype=torch.float64)
    dweight, dbias = (None if t is None else torch.empty_like(t).contiguous() for t in wanted)
    parts = _parts(sums, tiles)
    gradients = (dbias, dweight) if parts is sums else (None, None)
    _run(
        triton_kernels.backward_reduce,
        tiles.blocks * tiles.splits,
        *(dy, read, gated, x, parts, *_numbers(transform), *gradients, *tiles.size),
        *(dy_stride, samples.stride, samples.dense_stride, tiles.number, tiles.splits),
        UNIT=tiles.unit(dy_stride, samples.stride, samples.dense_stride),
        RELU=transform.relu,
        **tiles.constants,
    )
    if parts is not sums:
        _combine(parts, sums, tiles, dbias, dweight)
    return gated, sums, dweight, dbias


def backward_elemt(
    dy: Tensor, x: Tensor, transform: Transform, sums: Tensor, may_overwrite: bool = False
) -> Tensor:
    """See :func:`syncbn.kernels.reference.backward_elemt`."""
    x, samples = readable(x)
    dy, dy_stride = alike(dy, x, samples)
    tiles = _tiles(samples, x.dtype)
    over = may_overwrite and dy_stride == samples.dense_stride
    dx = dy if over else empty_like(x, samples)
    _run(
        triton_kernels.backward_elemt,
        tiles.programs,
        *(dy, x, dx, sums, *_numbers(transform)),
        *(*tiles.size, dy_stride, samples.stride, samples.dense_stride),
        UNIT=tiles.unit(dy_stride, samples.stride, samples.dense_stride),
        RELU=transform.relu,
        TILES=tiles.each,
        **tiles.constants,
    )
    return dx


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=1024)
def _tiles(samples: Samples, dtype: torch.dtype) -> Tiles:
    """Return how programs share a tensor.

    Dense positions are taken in blocks that pad little, up to 64 samples of them; dense channels in
    blocks of 128 bytes or more, for positions one after the other.
    """
    channels = samples.channels
    # Where there are no values, one is looked for in no samples.
    some = samples.batch * samples.space > 0
    batch, space = (samples.batch, samples.space) if some else (1, 1)
    all_channels = next_power_of_2(channels)
    if last := space == 1:
        batch, space = 1, batch
        block_c = min(_DENSE_CHANNELS, all_channels)
        block_n, block_s = 1, min(_TILE // block_c, next_power_of_2(space))
    else:
        block_s = _along(space)
        block_n = min(_TILE // block_s, next_power_of_2(batch))
    block_c = min(_TILE // (block_n * block_s), all_channels)
    values = block_n * block_s * block_c
    constants = {
        "LAST": last,
        "BLOCK_N": block_n,
        "BLOCK_S": block_s,
        "BLOCK_C": block_c,
        "COMPUTE": _COMPUTE[dtype],
        # Said, since Triton's default is about to change, and it warns.
        "enable_fp_fusion": True,
        "num_warps": min(max(values // _OF_A_WARP, 1), _TILE // _OF_A_WARP),
    }
    number = _cdiv(batch, block_n) * _cdiv(space, block_s)
    size = (batch if some else 0, channels, space)
    return Tiles(size, constants, _cdiv(channels, block_c), number)


def _along(space: int) -> int:
    """Return the block for dense positions: the largest of those that pad by an eighth at most."""
    most: int = min(_LONGEST, next_power_of_2(space))
    blocks = [most >> i for i in range(most.bit_length()) if most >> i >= min(_SHORTEST, most)]
    padded = {block: _cdiv(space, block) * block for block in blocks}
    bound = max(min(padded.values()), space * 9 // 8)
    return max(block for block in blocks if padded[block] <= bound)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _parts(sums: Tensor, tiles: Tiles) -> Tensor:
    """Return where programs write: to the result if they are alone with their channels."""
    if tiles.splits == 1:
        return sums
    return sums.new_empty(tiles.splits, 2 * tiles.size[1])


def _combine(
    parts: Tensor,
    sums: Tensor,
    tiles: Tiles,
    dbias: Tensor | None = None,
    dweight: Tensor | None = None,
    count: int | None = None,
) -> None:
    channels = tiles.size[1]
    block_k = min(next_power_of_2(tiles.splits), _TOGETHER)
    block_c = min(next_power_of_2(channels), _COMBINED // block_k)
    _run(
        triton_kernels.combine,
        _cdiv(channels, block_c),
        *(parts, sums, dbias, dweight, channels, tiles.splits, count),
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        num_warps=_COMBINED // _OF_A_WARP,
        enable_fp_fusion=True,
    )


def _run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device.
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants)
    else:
        kernel[(programs,)](*arguments, **constants)


def _numbers(t: Transform) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return t.statistics, _dense_numbers(t.weight), _dense_numbers(t.bias)


def _dense_numbers(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.resolve_neg().contiguous()


def _dense(t: Tensor, x: Tensor, samples: Samples) -> Tensor:
    """Return t as x is seen, without gaps."""
    t, stride = alike(t, x, samples)
    return t if stride == samples.dense_stride else empty_like(x, samples).copy_(t)


def _can_move(running: Running, x: Tensor) -> bool:
    """Return whether the kernel can move these averages."""
    mean, var, tracked, _ = running
    plain = all(
        t is None or (t.device == x.device and t.is_contiguous() and not t.is_neg())
        for t in (mean, var, tracked)
    )
    return plain and (tracked is None or tracked.dtype is torch.int64)
