"""How programs of the Triton kernels share a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from triton import next_power_of_2

from syncbn.kernels.layout import Samples

COMPUTE = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
}
# What a thread can read at a time.
_BYTES_AT_A_TIME = 16
# A warp has 16 values a thread.
_OF_A_WARP = 512
# Of dense positions: few, since each is compiled; and the longest, but of a sample of one channel.
_BLOCKS, _LONGEST = (256, 64), 1024
# Where an elementwise pass has many tiles, programs take several.
_MANY = 2048
# What all programs of a reduction that a multiprocessor runs at a time ask for ahead of what they
# add up, in bytes.
_AHEAD = 65536
# What a program of a reduction does once, what it takes to have splits, and to add up as many as
# are added up at a time: in tiles.
_ONCE, _SPLITTING, _COMBINING = 4, 3, 2
# Programs in turn that may share channels; and numbers that the last of them adds up at a time.
_WAVES, _COMBINED = 4, 4096
_LEAST_SHARED = 1 << 16, 1 << 10
# Registers of a multiprocessor, and of a thread.
_REGISTERS, _MOST_REGISTERS = 65536, 255
# Where the offsets within a tile need 64 bits.
_WIDE = 2**31


@dataclass(frozen=True)
class Shape:
    """Of the tiles of a pass.

    Attributes:
        tile: values.
        dense_channels: of a tile at most, where channels are dense.
        at_a_time: programs on a multiprocessor.
        tiles: that a program takes, of many.
    """

    tile: int
    dense_channels: int = 1
    at_a_time: int = 1
    tiles: int = 1


# Measured on an H200. 128 bytes of a half type are a row; the fewer channels a tile of sums has,
# the fewer programs share them.
_ELEMENTWISE_LAST, _ELEMENTWISE = Shape(2048, 64, tiles=4), Shape(4096, tiles=2)
_SUMS_LAST, _SUMS = Shape(4096, 32, at_a_time=2), Shape(1024, at_a_time=8)


@dataclass(frozen=True)
class Tiles:
    """How programs share a tensor; see :mod:`syncbn.kernels.triton.device`.

    Attributes:
        size: samples, channels and space.
        constants: of all kernels.
        blocks: of channels.
        number: of tiles that a channel has.
        along: of these, in a sample.
        unit: values that are read at a time, if rows allow it: 16 bytes.
        each: how many of them a program of an elementwise pass takes.
        splits: in how many parts a channel is summed.
        at_a_time: programs on a multiprocessor.
    """

    size: tuple[int, int, int]
    constants: dict[str, Any]
    blocks: int
    number: int
    along: int
    unit: int
    each: int = 1
    splits: int = 1
    at_a_time: int = 1

    @property
    def shared(self) -> tuple[int, int] | None:
        """How much programs tell each other, if they share channels.

        At least as many numbers as they leave to the last, and as there are blocks of channels:
        of few different sizes, for memory to serve again.
        """
        if self.splits == 1:
            return None
        numbers = self.parts * 2 * int(self.constants["BLOCK_C"])
        least_numbers, least_blocks = _LEAST_SHARED
        return (
            max(next_power_of_2(numbers), least_numbers),
            max(next_power_of_2(self.blocks), least_blocks),
        )

    @property
    def parts(self) -> int:
        """Programs of a reduction."""
        return self.blocks * self.splits

    @property
    def programs(self) -> int:
        """Programs of an elementwise pass."""
        return self.blocks * cdiv(self.number, self.each)

    @property
    def is_full(self) -> bool:
        """Whether all values of all tiles exist."""
        blocks = (self.constants[name] for name in ("BLOCK_N", "BLOCK_C", "BLOCK_S"))
        full = (size % block == 0 for size, block in zip(self.size, blocks, strict=True))
        return self.size[0] > 0 and all(full)


def for_elements(samples: Samples, dtype: torch.dtype) -> Tiles:
    """Return how programs of an elementwise pass share a tensor."""
    shape = _ELEMENTWISE_LAST if samples.space == 1 else _ELEMENTWISE
    found = _tiles(samples, dtype, shape)
    if found.blocks * found.number <= _MANY:
        return found
    # Where all are full, so are all that programs take.
    return replace(
        found, each=math.gcd(shape.tiles, found.number) if found.is_full else shape.tiles
    )


def for_sums(samples: Samples, dtype: torch.dtype, multiprocessors: int) -> Tiles:
    """Return how programs of a reduction share a tensor."""
    shape = _SUMS_LAST if samples.space == 1 else _SUMS
    found = _tiles(samples, dtype, shape)
    # Smaller programs have room for more beside them.
    slots = shape.at_a_time * multiprocessors * shape.tile
    slots //= _OF_A_WARP * found.constants["num_warps"]
    at_once = _COMBINED // found.constants["BLOCK_C"]
    splits = _splits(found.blocks, found.number, slots, at_once)
    return replace(found, splits=splits, at_a_time=shape.at_a_time)


def elementwise(tiles: Tiles, *strides: int) -> dict[str, Any]:
    """Return the constants of an elementwise kernel.

    Args:
        tiles: from :func:`for_elements`.
        strides: of samples, in what it reads and writes.
    """
    return {"TILES": tiles.each, **_common(tiles, strides)}


def reduction(tiles: Tiles, itemsize: int, *strides: int) -> dict[str, Any]:
    """Return the constants of a kernel that reads and sums up tensors.

    Args:
        tiles: from :func:`for_sums`.
        itemsize: of a value in all of them together.
        strides: of samples, in what it reads and writes.
    """
    found = _common(tiles, strides)
    # Tiles that are read a value at a time are in flight as it is.
    ahead, block_c = 0, found["BLOCK_C"]
    if found["UNIT"] > 1:
        tile = itemsize * found["BLOCK_N"] * found["BLOCK_S"] * block_c
        ahead = max(_AHEAD // (tiles.at_a_time * tile), 1)
        # No further than a program goes: each stage is compiled.
        ahead = min(ahead, cdiv(tiles.number, tiles.splits) - 1)
    threads = tiles.at_a_time * 32 * found["num_warps"]
    return {
        "AHEAD": ahead,
        "BLOCK_K": max(min(next_power_of_2(tiles.splits), _COMBINED // block_c), 1),
        "maxnreg": min(_REGISTERS // threads, _MOST_REGISTERS),
        **found,
    }


@lru_cache(maxsize=1024)
def gate_bytes(samples: Samples, dtype: torch.dtype) -> int:
    """Return how many bytes a bit for each value takes, see :mod:`syncbn.kernels.triton.relu_mask`."""
    if samples.batch * samples.space == 0:
        return 0
    dense = samples.channels if samples.space == 1 else samples.space
    rows = samples.batch * (1 if samples.space == 1 else samples.channels)
    return rows * cdiv(dense, _pack(dense, dtype))


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def _tiles(samples: Samples, dtype: torch.dtype, shape: Shape) -> Tiles:
    """Return tiles.

    Dense positions are taken in blocks that pad little, of as many samples as there is room for;
    dense channels in rows of as many as the shape says, for positions one after the other.
    """
    channels = samples.channels
    # Where there are no values, one is looked for in no samples.
    some = samples.batch * samples.space > 0
    batch, space = (samples.batch, samples.space) if some else (1, 1)
    all_channels = next_power_of_2(channels)
    if last := space == 1:
        batch, space = 1, batch
        block_c = min(shape.dense_channels, all_channels)
        block_n, block_s = 1, min(shape.tile // block_c, next_power_of_2(space))
    else:
        longest = shape.tile // min(next_power_of_2(batch) * all_channels, _LONGEST)
        block_s = min(_along(space, longest), shape.tile)
        block_n = min(shape.tile // block_s, next_power_of_2(batch))
    block_c = min(shape.tile // (block_n * block_s), all_channels)
    values = block_n * block_s * block_c
    warps = max(values // _OF_A_WARP, 1)
    constants = {
        "LAST": last,
        "PACK": _pack(channels if last else space, dtype),
        "ROWS": max(32 * warps // block_c, 1) if last else 1,
        "BLOCK_N": block_n,
        "BLOCK_S": block_s,
        "BLOCK_C": block_c,
        "COMPUTE": COMPUTE[dtype],
        # Said, since Triton's default is about to change, and it warns.
        "enable_fp_fusion": True,
        "num_warps": warps,
    }
    along = cdiv(space, block_s)
    size = (batch if some else 0, channels, space)
    number, blocks = cdiv(batch, block_n) * along, cdiv(channels, block_c)
    return Tiles(size, constants, blocks, number, along, _BYTES_AT_A_TIME // dtype.itemsize)


def _common(tiles: Tiles, strides: tuple[int, ...]) -> dict[str, Any]:
    _, channels, space = tiles.size
    of, furthest = tiles.constants, max(strides)
    # UNIT: the power of two that all rows of what is dense are multiples of, up to 16 bytes.
    if of["LAST"]:
        unit, extent = channels, of["BLOCK_S"] * furthest + of["BLOCK_C"]
    else:
        unit, extent = space, of["BLOCK_N"] * furthest + of["BLOCK_C"] * space + of["BLOCK_S"]
    return {
        "UNIT": math.gcd(tiles.unit, unit, *strides),
        "SAME": len({*strides}) == 1,
        "FULL": tiles.is_full,
        "WIDE": extent >= _WIDE,
        **of,
    }


def _splits(blocks: int, number: int, slots: int, at_once: int) -> int:
    """Return in how many parts channels are summed, for the least time."""

    def time(splits: int) -> int:
        waves = cdiv(blocks * splits, slots)
        combining = _SPLITTING + _COMBINING * cdiv(splits, at_once) if splits > 1 else 0
        return waves * (cdiv(number, splits) + _ONCE) + combining

    return min(range(1, min(number, cdiv(_WAVES * slots, blocks)) + 1), key=time)


def _along(space: int, longest: int) -> int:
    """Return the block for dense positions: the largest of those that pad by an eighth at most."""
    most: int = min(max(longest, _LONGEST), next_power_of_2(space))
    blocks = [most, *(block for block in _BLOCKS if block < most)]
    padded = {block: cdiv(space, block) * block for block in blocks}
    bound = max(min(padded.values()), space * 9 // 8)
    return max(block for block in blocks if padded[block] <= bound)


def _pack(dense: int, dtype: torch.dtype) -> int:
    return int(min(_BYTES_AT_A_TIME // dtype.itemsize, next_power_of_2(dense)))
