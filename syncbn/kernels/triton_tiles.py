"""How programs of the Triton kernels share a tensor."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from syncbn.kernels.samples import Samples

COMPUTE = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
# Values of a tile, and of a warp of those that share it: 16 a thread.
_TILE, OF_A_WARP = 4096, 512
# Channels of a tile where these are dense: 128 bytes of a half type.
_DENSE_CHANNELS = 64
# Of blocks of dense positions: but where there are fewer; and of a sample of one channel.
_SHORTEST, _LONGEST = 64, 1024
# What a program of a reduction asks for ahead of what it adds up, in bytes.
_AHEAD = 16384
# What a program of a reduction does once, and what adding up splits takes, in tiles.
_ONCE, _COMBINING = 6, 8
# Programs of reductions that a multiprocessor runs at a time, and its registers, which allow it.
AT_A_TIME, _REGISTERS = 2, 65536
_MOST_REGISTERS = 255
# Where an elementwise pass has many programs, each takes several tiles.
_MANY, _TILES = 2048, 4


class Tiles(NamedTuple):
    """How programs share a tensor; see :mod:`syncbn.kernels.triton_kernels`.

    Attributes:
        size: samples, channels and space.
        constants: of all kernels.
        blocks: of channels.
        number: of tiles that a channel has.
        splits: in how many parts a channel is summed.
    """

    size: tuple[int, int, int]
    constants: dict[str, Any]
    blocks: int
    number: int
    splits: int

    def elementwise(self, *strides: int) -> dict[str, Any]:
        """Return the constants of an elementwise kernel."""
        return {"TILES": self.each, "UNIT": self.unit(*strides), **self.constants}

    def unit(self, *strides: int) -> int:
        """Return the power of two, 16 at most, that all rows of what is dense are multiples of."""
        _, channels, space = self.size
        return math.gcd(16, channels if self.constants["LAST"] else space, *strides)

    def reduction(self, tensors: list[Tensor], *strides: int) -> dict[str, Any]:
        """Return the constants of a kernel that reads and sums up tensors."""
        unit = self.unit(*strides)
        # Tiles that are read a value at a time are in flight as it is.
        ahead = 0
        if unit > 1:
            ahead = max(_AHEAD // (_TILE * sum(t.itemsize for t in tensors)), 1)
        registers = _REGISTERS // (AT_A_TIME * 32 * self.constants["num_warps"])
        most = min(registers, _MOST_REGISTERS)
        return {"AHEAD": ahead, "maxnreg": most, "UNIT": unit, **self.constants}

    @property
    def gate(self) -> int:
        """Bytes of a bit for each value, see :mod:`syncbn.kernels.triton_gates`."""
        of = self.constants
        values = of["BLOCK_N"] * of["BLOCK_S"] * of["BLOCK_C"]
        found: int = self.blocks * self.number * values // of["PACK"]
        return found

    @property
    def each(self) -> int:
        """How many tiles a program of an elementwise pass takes."""
        return _TILES if self.blocks * self.number > _MANY else 1

    @property
    def programs(self) -> int:
        """Programs of an elementwise pass."""
        return self.blocks * cdiv(self.number, self.each)


@lru_cache(maxsize=1024)
def tiles_of(samples: Samples, dtype: torch.dtype, slots: int) -> Tiles:
    """Return how programs share a tensor, of which ``slots`` run at a time.

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
        block_s = _along(space, _TILE // min(next_power_of_2(batch) * all_channels, _LONGEST))
        block_n = min(_TILE // block_s, next_power_of_2(batch))
    block_c = min(_TILE // (block_n * block_s), all_channels)
    values = block_n * block_s * block_c
    warps = min(max(values // OF_A_WARP, 1), _TILE // OF_A_WARP)
    constants = {
        "LAST": last,
        "PACK": min(16 // dtype.itemsize, block_c if last else block_n * block_s),
        "ROWS": max(32 * warps // block_c, 1) if last else 1,
        "BLOCK_N": block_n,
        "BLOCK_S": block_s,
        "BLOCK_C": block_c,
        "COMPUTE": COMPUTE[dtype],
        # Said, since Triton's default is about to change, and it warns.
        "enable_fp_fusion": True,
        "num_warps": warps,
    }
    number = cdiv(batch, block_n) * cdiv(space, block_s)
    size = (batch if some else 0, channels, space)
    blocks = cdiv(channels, block_c)
    # Smaller programs have room for more beside them.
    slots *= _TILE // (OF_A_WARP * warps)
    return Tiles(size, constants, blocks, number, _splits(blocks, number, slots))


def _splits(blocks: int, number: int, slots: int) -> int:
    """Return in how many parts channels are summed, for the least time."""

    def time(splits: int) -> int:
        waves = cdiv(blocks * splits, slots)
        return waves * (cdiv(number, splits) + _ONCE) + (_COMBINING if splits > 1 else 0)

    return min(range(1, min(number, cdiv(4 * slots, blocks)) + 1), key=time)


def _along(space: int, longest: int) -> int:
    """Return the block for dense positions: the largest of those that pad by an eighth at most."""
    most: int = min(max(longest, _LONGEST), next_power_of_2(space))
    blocks = [most >> i for i in range(most.bit_length()) if most >> i >= min(_SHORTEST, most)]
    padded = {block: cdiv(space, block) * block for block in blocks}
    bound = max(min(padded.values()), space * 9 // 8)
    return max(block for block in blocks if padded[block] <= bound)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)
