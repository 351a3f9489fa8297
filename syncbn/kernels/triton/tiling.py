"""Division of a tensor into tiles, and of tiles among the programs of a Triton kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from triton import next_power_of_2

from syncbn.kernels.layout import NCSLayout

COMPUTE = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
}
# Vector load of a thread.
_VECTOR_BYTES = 16
# 16 values per thread.
_VALUES_PER_WARP = 512
# Spatial block sizes: few, since each is compiled; and the longest, except for single channels.
_BLOCKS, _LONGEST = (256, 64), 1024
# From this number of tiles, a program of an elementwise pass handles several.
_MANY_TILES = 2048
# Bytes prefetched per multiprocessor by a reduction.
_PREFETCHED_BYTES = 65536
# Costs of a reduction, in tiles: prologue of a program, any split, combining one block of splits.
_PROLOGUE_COST, _SPLIT_COST, _COMBINE_COST = 4, 3, 2
# Waves of programs that may share channels; values that the last program combines at a time.
_MAX_WAVES, _COMBINE_SIZE = 4, 4096
# Least number of counters: few sizes, so that one tensor serves many layers.
_LEAST_COUNTERS = 1 << 10
# Register limits of a multiprocessor and of a thread.
_REGISTERS_PER_SM, _REGISTERS_PER_THREAD = 65536, 255
# Extent of a tile from which its offsets need 64 bits.
_INT32_LIMIT = 2**31


@dataclass(frozen=True)
class TileShape:
    """Shape of the tiles of a pass.

    Attributes:
        tile: values per tile.
        max_channels: channels per tile at most, in channels_last.
        programs_per_sm: resident programs per multiprocessor.
        tiles: tiles per program of a large tensor.
    """

    tile: int
    max_channels: int = 1
    programs_per_sm: int = 1
    tiles: int = 1


# Measured on an H200. A row of a half type has 128 bytes; the fewer channels a tile of a reduction
# has, the fewer programs share a channel.
_ELEMENTWISE_CHANNELS_LAST, _ELEMENTWISE = TileShape(2048, 64, tiles=4), TileShape(4096, tiles=2)
_REDUCTION_CHANNELS_LAST = TileShape(4096, 32, programs_per_sm=2)
_REDUCTION = TileShape(1024, programs_per_sm=8)


@dataclass(frozen=True)
class Tiling:
    """Tiles of a tensor and their programs; see :mod:`syncbn.kernels.triton.device`.

    Attributes:
        size: samples, channels and space.
        constants: constants of every kernel.
        blocks: blocks of channels.
        tiles: tiles per channel.
        tiles_per_sample: tiles per channel and sample.
        vector: values per vector load.
        tiles_per_program: tiles of a program of an elementwise pass.
        splits: programs that share a channel in a reduction.
        programs_per_sm: resident programs per multiprocessor.
    """

    size: tuple[int, int, int]
    constants: dict[str, Any]
    blocks: int
    tiles: int
    tiles_per_sample: int
    vector: int
    tiles_per_program: int = 1
    splits: int = 1
    programs_per_sm: int = 1

    @property
    def workspace(self) -> tuple[int, int] | None:
        """Sizes of partial sums and of counters; None if no programs share a channel."""
        if self.splits == 1:
            return None
        partials = self.reduction_programs * 2 * int(self.constants["BLOCK_C"])
        return partials, max(next_power_of_2(self.blocks), _LEAST_COUNTERS)

    @property
    def reduction_programs(self) -> int:
        """Grid of a reduction."""
        return self.blocks * self.splits

    @property
    def programs(self) -> int:
        """Grid of an elementwise pass."""
        return self.blocks * cdiv(self.tiles, self.tiles_per_program)

    @property
    def is_even(self) -> bool:
        """True if no tile reaches past the end of the tensor."""
        blocks = (self.constants[name] for name in ("BLOCK_N", "BLOCK_C", "BLOCK_S"))
        full = (size % block == 0 for size, block in zip(self.size, blocks, strict=True))
        return self.size[0] > 0 and all(full)


def tile_elementwise(layout: NCSLayout, dtype: torch.dtype) -> Tiling:
    """Return the tiling of an elementwise pass over a tensor."""
    shape = _ELEMENTWISE_CHANNELS_LAST if layout.space == 1 else _ELEMENTWISE
    tiling = _tile(layout, dtype, shape)
    if tiling.blocks * tiling.tiles <= _MANY_TILES:
        return tiling
    # An even tiling stays even.
    each = math.gcd(shape.tiles, tiling.tiles) if tiling.is_even else shape.tiles
    return replace(tiling, tiles_per_program=each)


def tile_reduction(layout: NCSLayout, dtype: torch.dtype, multiprocessors: int) -> Tiling:
    """Return the tiling of a reduction over a tensor."""
    shape = _REDUCTION_CHANNELS_LAST if layout.space == 1 else _REDUCTION
    tiling = _tile(layout, dtype, shape)
    # More of the smaller programs fit on a multiprocessor.
    slots = shape.programs_per_sm * multiprocessors * shape.tile
    slots //= _VALUES_PER_WARP * tiling.constants["num_warps"]
    at_once = _COMBINE_SIZE // tiling.constants["BLOCK_C"]
    splits = _best_splits(tiling.blocks, tiling.tiles, slots, at_once)
    return replace(tiling, splits=splits, programs_per_sm=shape.programs_per_sm)


def elementwise_constants(tiles: Tiling, *strides: int) -> dict[str, Any]:
    """Return the constants of an elementwise kernel.

    Args:
        tiles: result of :func:`tile_elementwise`.
        strides: strides between samples of its operands.
    """
    return {"TILES": tiles.tiles_per_program, **_common(tiles, strides)}


def reduction_constants(tiles: Tiling, itemsize: int, *strides: int) -> dict[str, Any]:
    """Return the constants of a reduction kernel.

    Args:
        tiles: result of :func:`tile_reduction`.
        itemsize: bytes per position, summed over its operands.
        strides: strides between samples of its operands.
    """
    tiling = _common(tiles, strides)
    # Scalar loads keep enough bytes in flight without prefetching.
    ahead, block_c = 0, tiling["BLOCK_C"]
    if tiling["DIVISIBILITY"] > 1:
        tile = itemsize * tiling["BLOCK_N"] * tiling["BLOCK_S"] * block_c
        ahead = max(_PREFETCHED_BYTES // (tiles.programs_per_sm * tile), 1)
        # No more stages than tiles of a program: each stage is compiled.
        ahead = min(ahead, cdiv(tiles.tiles, tiles.splits) - 1)
    threads = tiles.programs_per_sm * 32 * tiling["num_warps"]
    return {
        "NUM_STAGES": ahead + 1,
        "BLOCK_K": max(min(next_power_of_2(tiles.splits), _COMBINE_SIZE // block_c), 1),
        "maxnreg": min(_REGISTERS_PER_SM // threads, _REGISTERS_PER_THREAD),
        **tiling,
    }


@lru_cache(maxsize=1024)
def relu_mask_bytes(layout: NCSLayout, dtype: torch.dtype) -> int:
    """Return the size of a packed ReLU mask (:mod:`syncbn.kernels.triton.relu_mask`)."""
    if layout.batch * layout.space == 0:
        return 0
    dense = layout.channels if layout.space == 1 else layout.space
    rows = layout.batch * (1 if layout.space == 1 else layout.channels)
    return rows * cdiv(dense, _pack(dense, dtype))


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def _tile(layout: NCSLayout, dtype: torch.dtype, shape: TileShape) -> Tiling:
    """Return the tiling for a tile shape.

    Contiguous: spatial blocks with little padding, of as many samples as fit. Channels_last: rows
    of ``max_channels`` for consecutive positions.
    """
    channels = layout.channels
    # An empty tensor gets one tile of no samples.
    some = layout.batch * layout.space > 0
    batch, space = (layout.batch, layout.space) if some else (1, 1)
    all_channels = next_power_of_2(channels)
    if last := space == 1:
        batch, space = 1, batch
        block_c = min(shape.max_channels, all_channels)
        block_n, block_s = 1, min(shape.tile // block_c, next_power_of_2(space))
    else:
        longest = shape.tile // min(next_power_of_2(batch) * all_channels, _LONGEST)
        block_s = min(_spatial_block(space, longest), shape.tile)
        block_n = min(shape.tile // block_s, next_power_of_2(batch))
    block_c = min(shape.tile // (block_n * block_s), all_channels)
    values = block_n * block_s * block_c
    warps = max(values // _VALUES_PER_WARP, 1)
    constants = {
        "CHANNELS_LAST": last,
        "PACK": _pack(channels if last else space, dtype),
        "REPLICAS": max(32 * warps // block_c, 1) if last else 1,
        "BLOCK_N": block_n,
        "BLOCK_S": block_s,
        "BLOCK_C": block_c,
        "COMPUTE": COMPUTE[dtype],
        # Explicit: Triton warns that its default will change.
        "enable_fp_fusion": True,
        "num_warps": warps,
    }
    tiles_per_sample = cdiv(space, block_s)
    size = (batch if some else 0, channels, space)
    tiles, blocks = cdiv(batch, block_n) * tiles_per_sample, cdiv(channels, block_c)
    return Tiling(size, constants, blocks, tiles, tiles_per_sample, _VECTOR_BYTES // dtype.itemsize)


def _common(tiles: Tiling, strides: tuple[int, ...]) -> dict[str, Any]:
    _, channels, space = tiles.size
    of, furthest = tiles.constants, max(strides)
    # DIVISIBILITY: power of two, up to 16 bytes, that all dense rows are multiples of.
    if of["CHANNELS_LAST"]:
        vector, extent = channels, of["BLOCK_S"] * furthest + of["BLOCK_C"]
    else:
        vector, extent = space, of["BLOCK_N"] * furthest + of["BLOCK_C"] * space + of["BLOCK_S"]
    return {
        "DIVISIBILITY": math.gcd(tiles.vector, vector, *strides),
        "SAME_STRIDES": len({*strides}) == 1,
        "EVEN": tiles.is_even,
        "INT64_OFFSETS": extent >= _INT32_LIMIT,
        **of,
    }


def _best_splits(blocks: int, tiles: int, slots: int, at_once: int) -> int:
    """Return the number of programs per channel with the least estimated time."""

    def time(splits: int) -> int:
        waves = cdiv(blocks * splits, slots)
        combining = _SPLIT_COST + _COMBINE_COST * cdiv(splits, at_once) if splits > 1 else 0
        return waves * (cdiv(tiles, splits) + _PROLOGUE_COST) + combining

    return min(range(1, min(tiles, cdiv(_MAX_WAVES * slots, blocks)) + 1), key=time)


def _spatial_block(space: int, longest: int) -> int:
    """Return the largest spatial block that pads by an eighth at most."""
    most: int = min(max(longest, _LONGEST), next_power_of_2(space))
    blocks = [most, *(block for block in _BLOCKS if block < most)]
    padded = {block: cdiv(space, block) * block for block in blocks}
    bound = max(min(padded.values()), space * 9 // 8)
    return max(block for block in blocks if padded[block] <= bound)


def _pack(dense: int, dtype: torch.dtype) -> int:
    return int(min(_VECTOR_BYTES // dtype.itemsize, next_power_of_2(dense)))
