"""Division of a tensor into tiles, and of tiles among the programs of a Triton kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

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


class TileShape(NamedTuple):
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


class Tiling(NamedTuple):
    """Tiles of a tensor and the programs of a kernel; see :mod:`syncbn.kernels.triton.kernels`.

    Attributes:
        programs: grid.
        constants: sizes and constants of the kernel, and options of Triton.
        workspace: sizes of partial sums and of counters; None if no programs share a channel.
    """

    programs: int
    constants: dict[str, Any]
    workspace: tuple[int, int] | None = None


def tile_elementwise(layout: NCSLayout, dtype: torch.dtype, strides: Sequence[int]) -> Tiling:
    """Return the tiling of an elementwise pass; strides between the samples of its operands."""
    shape = _ELEMENTWISE_CHANNELS_LAST if layout.space == 1 else _ELEMENTWISE
    blocks, constants = _tile(layout, dtype, shape, strides)
    tiles, each = constants["tiles"], 1
    if blocks * tiles > _MANY_TILES:
        # An even tiling stays even.
        each = math.gcd(shape.tiles, tiles) if constants["EVEN"] else shape.tiles
    return Tiling(blocks * cdiv(tiles, each), constants | {"TILES": each})


def tile_reduction(
    layout: NCSLayout,
    dtype: torch.dtype,
    strides: Sequence[int],
    itemsize: int,
    multiprocessors: int,
) -> Tiling:
    """Return the tiling of a reduction.

    Args:
        layout: layout of x.
        dtype: dtype of x.
        strides: strides between the samples of its operands.
        itemsize: bytes per position, summed over its operands.
        multiprocessors: number of multiprocessors.
    """
    shape = _REDUCTION_CHANNELS_LAST if layout.space == 1 else _REDUCTION
    blocks, constants = _tile(layout, dtype, shape, strides)
    tiles, warps, block_c = (constants[name] for name in ("tiles", "num_warps", "BLOCK_C"))
    # More of the smaller programs fit on a multiprocessor.
    slots = shape.programs_per_sm * multiprocessors * shape.tile // (_VALUES_PER_WARP * warps)
    at_once = _COMBINE_SIZE // block_c
    splits = _best_splits(blocks, tiles, slots, at_once)
    # Scalar loads keep enough bytes in flight without prefetching.
    ahead = 0
    if constants["DIVISIBILITY"] > 1:
        tile = itemsize * constants["BLOCK_N"] * constants["BLOCK_S"] * block_c
        ahead = max(_PREFETCHED_BYTES // (shape.programs_per_sm * tile), 1)
        # No more stages than tiles of a program: each stage is compiled.
        ahead = min(ahead, cdiv(tiles, splits) - 1)
    registers = _REGISTERS_PER_SM // (shape.programs_per_sm * 32 * warps)
    constants |= {
        "splits": splits,
        "NUM_STAGES": ahead + 1,
        "BLOCK_K": max(min(next_power_of_2(splits), at_once), 1),
        "maxnreg": min(registers, _REGISTERS_PER_THREAD),
    }
    programs = blocks * splits
    counters = max(next_power_of_2(blocks), _LEAST_COUNTERS)
    workspace = None if splits == 1 else (programs * 2 * block_c, counters)
    return Tiling(programs, constants, workspace)


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


def _tile(
    layout: NCSLayout, dtype: torch.dtype, shape: TileShape, strides: Sequence[int]
) -> tuple[int, dict[str, Any]]:
    """Return the number of blocks of channels, and the constants of every kernel.

    Contiguous: spatial blocks with little padding, of as many samples as fit. Channels_last: rows
    of ``max_channels`` for consecutive positions.
    """
    channels, furthest = layout.channels, max(strides)
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
    warps = max(block_n * block_s * block_c // _VALUES_PER_WARP, 1)
    tiles_per_sample = cdiv(space, block_s)
    dense = channels if last else space
    extent = (
        block_s * furthest + block_c if last else block_n * furthest + block_c * space + block_s
    )
    sizes = ((batch, block_n), (channels, block_c), (space, block_s))
    return cdiv(channels, block_c), {
        "samples": batch if some else 0,
        "channels": channels,
        "space": space,
        "tiles": cdiv(batch, block_n) * tiles_per_sample,
        "tiles_per_sample": tiles_per_sample,
        "CHANNELS_LAST": last,
        "PACK": _pack(dense, dtype),
        "REPLICAS": max(32 * warps // block_c, 1) if last else 1,
        "BLOCK_N": block_n,
        "BLOCK_S": block_s,
        "BLOCK_C": block_c,
        "COMPUTE": COMPUTE[dtype],
        # Power of two, up to 16 bytes, that all dense rows are multiples of.
        "DIVISIBILITY": math.gcd(_VECTOR_BYTES // dtype.itemsize, dense, *strides),
        "SAME_STRIDES": len({*strides}) == 1,
        # No tile reaches past the end of the tensor.
        "EVEN": some and all(size % block == 0 for size, block in sizes),
        "INT64_OFFSETS": extent >= _INT32_LIMIT,
        # Explicit: Triton warns that its default will change.
        "enable_fp_fusion": True,
        "num_warps": warps,
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
