"""Passes over a tensor: their kernels, how programs share the tensor, and what they are told.

A group of one has both kernels of a pass launched together, and what the second reads of the first
is in memory of the stream. Layers see the same few shapes again and again: launches are kept.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from typing import TypeAlias

import torch

from syncbn.kernels.layout import Samples
from syncbn.kernels.triton import device as triton_kernels
from syncbn.kernels.triton.launcher import Launch, Shared, Step
from syncbn.kernels.triton.tiling import Tiles, elementwise, for_elements, for_sums, reduction

#: Dtypes of the tensors of a launch; None for those that are not given.
Kinds: TypeAlias = "tuple[torch.dtype | None, ...]"

# What launches are given, in this order.
MOMENTS = "x_ptr", "message_ptr"
FORWARD = (
    *("x_ptr", "message_ptr", "residual_ptr", "y_ptr", "gate_ptr", "statistics_ptr"),
    *("weight_ptr", "bias_ptr", "running_mean_ptr", "running_var_ptr", "tracked_ptr"),
)
BACKWARD = (
    *("x_ptr", "sums_ptr", "dy_ptr", "gate_ptr", "gated_ptr", "dx_ptr", "statistics_ptr"),
    *("weight_ptr", "bias_ptr", "dweight_ptr", "dbias_ptr"),
)
THROUGH_GATE = "dy_ptr", "gate_ptr", "gated_ptr"
FLOATS = "eps", "momentum"

# For the interpreter: as many as GPUs have.
_MULTIPROCESSORS = 132
_kept = lru_cache(maxsize=4096)


@_kept
def moments(samples: Samples, device: torch.device, dtype: torch.dtype) -> Launch:
    """Return the launch of moments, of :data:`MOMENTS`."""
    step, shared = _moments(samples, device, dtype)
    return Launch(device, [step], MOMENTS, shared=shared)


@_kept
def forward(
    samples: Samples, device: torch.device, kinds: Kinds, relu: bool, cumulative: bool
) -> Launch:
    """Return the launches of the forward pass, of :data:`FORWARD` and :data:`FLOATS`.

    Args:
        samples: what kernels see in x.
        device: where.
        kinds: of the tensors. Without a message, moments come first.
        relu: whether a ReLU comes last.
        cumulative: whether the running averages are.
    """
    dtype, message, *_ = kinds
    assert dtype is not None
    last = _normalize(samples, dtype, relu, cumulative)
    if message is not None:
        return Launch(device, [last], FORWARD, FLOATS)
    first, shared = _moments(samples, device, dtype)
    shared = {**shared, "message_ptr": (2 * samples.channels + 1, torch.float64)}
    return Launch(device, [first, last], FORWARD, FLOATS, shared)


@_kept
def backward(
    samples: Samples, device: torch.device, kinds: Kinds, dy_stride: int, relu: bool
) -> Launch:
    """Return the launches of the backward pass, of :data:`BACKWARD`.

    Args:
        samples: what kernels see in x.
        device: where.
        kinds: of the tensors. Without dx, sums are written; with it, they are read, or without sums
            of the caller's both are launched.
        dy_stride: of the samples of dy.
        relu: whether a ReLU came last, without a residual.
    """
    dtype, sums, _, gate, _, dx, *_ = kinds
    assert dtype is not None
    first, shared = _reduce(samples, device, dtype, dy_stride, relu)
    if dx is None:
        return Launch(device, [first], BACKWARD, shared=shared)
    if gate is None:
        last = _elemt(samples, dtype, dy_stride, relu)
    else:
        # Of what came through it, which has no gaps.
        last = _elemt(samples, dtype, samples.dense_stride, relu)
        last = replace(last, standing_for={"dy_ptr": "gated_ptr"})
    if sums is not None:
        return Launch(device, [last], BACKWARD)
    shared = {**shared, "sums_ptr": (2 * samples.channels, torch.float64)}
    return Launch(device, [first, last], BACKWARD, shared=shared)


@_kept
def through_gate(
    samples: Samples, device: torch.device, dtype: torch.dtype, dy_stride: int | None
) -> Launch:
    """Return the launch that writes what of dy comes through a gate, of :data:`THROUGH_GATE`.

    Args:
        samples: what kernels see in x.
        device: where.
        dtype: of x and dy.
        dy_stride: of the samples of dy; None if a byte is written for each bit instead.
    """
    tiles, stride = for_elements(samples, dtype), samples.dense_stride
    strides = {"dy_stride": stride if dy_stride is None else dy_stride, "stride": stride}
    constants = elementwise(tiles, *strides.values())
    step = Step(triton_kernels.through_gate, tiles.programs, _sizes(tiles) | strides, constants)
    return Launch(device, [step], THROUGH_GATE)


def _moments(samples: Samples, device: torch.device, dtype: torch.dtype) -> tuple[Step, Shared]:
    tiles = for_sums(samples, dtype, _multiprocessors(device))
    count = samples.batch * samples.space
    sizes = _sizes(tiles) | {"x_stride": samples.stride, "splits": tiles.splits, "count": count}
    constants = reduction(tiles, dtype.itemsize, samples.stride)
    step = Step(triton_kernels.moments, tiles.parts, sizes, constants)
    return step, _shared(tiles)


def _normalize(samples: Samples, dtype: torch.dtype, relu: bool, cumulative: bool) -> Step:
    tiles = for_elements(samples, dtype)
    strides = {"x_stride": samples.stride, "stride": samples.dense_stride}
    constants = elementwise(tiles, *strides.values()) | {"RELU": relu, "CUMULATIVE": cumulative}
    return Step(triton_kernels.normalize, tiles.programs, _sizes(tiles) | strides, constants)


def _reduce(
    samples: Samples, device: torch.device, dtype: torch.dtype, dy_stride: int, relu: bool
) -> tuple[Step, Shared]:
    tiles = for_sums(samples, dtype, _multiprocessors(device))
    strides = _strides(samples, dy_stride)
    sizes = _sizes(tiles) | strides | {"splits": tiles.splits}
    constants = reduction(tiles, 2 * dtype.itemsize, *strides.values()) | {"RELU": relu}
    step = Step(triton_kernels.backward_reduce, tiles.parts, sizes, constants)
    return step, _shared(tiles)


def _elemt(samples: Samples, dtype: torch.dtype, dy_stride: int, relu: bool) -> Step:
    tiles = for_elements(samples, dtype)
    strides = _strides(samples, dy_stride)
    constants = elementwise(tiles, *strides.values()) | {"RELU": relu}
    sizes = _sizes(tiles) | strides
    return Step(triton_kernels.backward_elemt, tiles.programs, sizes, constants)


def _sizes(tiles: Tiles) -> dict[str, int]:
    samples, channels, space = tiles.size
    return {
        **{"samples": samples, "channels": channels, "space": space},
        **{"tiles": tiles.number, "along": tiles.along},
    }


def _strides(samples: Samples, dy_stride: int) -> dict[str, int]:
    return {"dy_stride": dy_stride, "x_stride": samples.stride, "stride": samples.dense_stride}


def _shared(tiles: Tiles) -> Shared:
    """Return what programs that share channels leave to the last, and how many have come."""
    if tiles.shared is None:
        return {}
    numbers, blocks = tiles.shared
    return {"parts_ptr": (numbers, torch.float64), "arrivals_ptr": (blocks, torch.int32)}


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
