"""Launch plans of the four kernels: grid, sizes and constants for a layout and dtypes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import torch

from syncbn.kernels.layout import NCSLayout
from syncbn.kernels.triton import device as kernels
from syncbn.kernels.triton.launcher import LaunchPlan, num_multiprocessors
from syncbn.kernels.triton.tiling import (
    Tiling,
    elementwise_constants,
    reduction_constants,
    tile_elementwise,
    tile_reduction,
)

#: Dtypes of the tensors of a launch; None for an argument that is None.
DTypes: TypeAlias = "tuple[torch.dtype | None, ...]"

# Layers see the same few shapes again and again.
_cached = lru_cache(maxsize=4096)


@_cached
def plan_moments(layout: NCSLayout, device: torch.device, dtype: torch.dtype) -> LaunchPlan:
    """Return the plan of ``moments(x, partials, counters, moments)``."""
    tiling = tile_reduction(layout, dtype, num_multiprocessors(device))
    count = layout.batch * layout.space
    constants = _sizes(tiling) | {"x_stride": layout.stride, "splits": tiling.splits}
    constants |= {"count": count} | reduction_constants(tiling, dtype.itemsize, layout.stride)
    arguments = "x_ptr", "partials_ptr", "counters_ptr", "moments_ptr"
    programs = tiling.reduction_programs
    return LaunchPlan(kernels.moments, programs, device, arguments, constants, tiling.workspace)


@_cached
def plan_normalize(
    layout: NCSLayout, device: torch.device, dtypes: DTypes, relu: bool, cumulative: bool
) -> LaunchPlan:
    """Return the plan of ``normalize(x, moments, residual, y, ..., eps, momentum)``.

    Args:
        layout: layout of x.
        device: device of the tensors.
        dtypes: dtypes of the tensors; x's first.
        relu: True for a ReLU as the last operation.
        cumulative: True for running statistics with ``momentum=None``.
    """
    tiling = tile_elementwise(layout, _first(dtypes))
    strides = {"x_stride": layout.stride, "stride": layout.dense_stride}
    constants = _sizes(tiling) | strides | elementwise_constants(tiling, *strides.values())
    constants |= {"RELU": relu, "CUMULATIVE": cumulative}
    arguments = (
        "x_ptr", "moments_ptr", "residual_ptr", "y_ptr", "relu_mask_ptr", "statistics_ptr",
        "weight_ptr", "bias_ptr", "running_mean_ptr", "running_var_ptr", "num_batches_ptr",
        "eps", "momentum",
    )  # fmt: skip
    return LaunchPlan(kernels.normalize, tiling.programs, device, arguments, constants)


@_cached
def plan_backward_reduce(
    layout: NCSLayout, device: torch.device, dtypes: DTypes, dy_stride: int, relu: bool
) -> LaunchPlan:
    """Return the plan of ``backward_reduce(x, dy, relu_mask, masked_dy, ..., dweight, dbias)``.

    Args:
        layout: layout of x.
        device: device of the tensors.
        dtypes: dtypes of the tensors; x's first.
        dy_stride: stride between the samples of dy.
        relu: True for a ReLU without a residual, whose mask is recomputed.
    """
    dtype = _first(dtypes)
    tiling = tile_reduction(layout, dtype, num_multiprocessors(device))
    strides = _strides(layout, dy_stride)
    constants = _sizes(tiling) | strides | {"splits": tiling.splits, "RELU": relu}
    constants |= reduction_constants(tiling, 2 * dtype.itemsize, *strides.values())
    arguments = (
        "x_ptr", "dy_ptr", "relu_mask_ptr", "masked_dy_ptr", "partials_ptr", "counters_ptr",
        "sums_ptr", "statistics_ptr", "weight_ptr", "bias_ptr", "dweight_ptr", "dbias_ptr",
    )  # fmt: skip
    programs = tiling.reduction_programs
    return LaunchPlan(
        kernels.backward_reduce, programs, device, arguments, constants, tiling.workspace
    )


@_cached
def plan_backward_elemt(
    layout: NCSLayout, device: torch.device, dtypes: DTypes, dy_stride: int, relu: bool
) -> LaunchPlan:
    """Return the plan of ``backward_elemt(x, dy, dx, sums, statistics, weight, bias)``.

    Arguments as for :func:`plan_backward_reduce`.
    """
    tiling = tile_elementwise(layout, _first(dtypes))
    strides = _strides(layout, dy_stride)
    constants = _sizes(tiling) | strides | {"RELU": relu}
    constants |= elementwise_constants(tiling, *strides.values())
    arguments = "x_ptr", "dy_ptr", "dx_ptr", "sums_ptr", "statistics_ptr", "weight_ptr", "bias_ptr"
    return LaunchPlan(kernels.backward_elemt, tiling.programs, device, arguments, constants)


def _first(dtypes: DTypes) -> torch.dtype:
    assert dtypes[0] is not None
    return dtypes[0]


def _sizes(tiling: Tiling) -> dict[str, Any]:
    samples, channels, space = tiling.size
    sizes = {"samples": samples, "channels": channels, "space": space}
    return sizes | {"tiles": tiling.tiles, "tiles_per_sample": tiling.tiles_per_sample}


def _strides(layout: NCSLayout, dy_stride: int) -> dict[str, int]:
    return {"dy_stride": dy_stride, "x_stride": layout.stride, "stride": layout.dense_stride}
