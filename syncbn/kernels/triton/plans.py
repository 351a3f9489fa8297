"""Launch plans of the four kernels: grid, sizes and constants for a layout and dtypes."""

from __future__ import annotations

from functools import lru_cache

import torch

from syncbn.kernels.layout import NCSLayout
from syncbn.kernels.triton import kernels
from syncbn.kernels.triton.launcher import LaunchPlan, num_multiprocessors
from syncbn.kernels.triton.tiling import tile_elementwise, tile_reduction


# Layers see the same few shapes again and again.
@lru_cache(maxsize=4096)
def plan_launch(
    name: str,
    layout: NCSLayout,
    device: torch.device,
    dtypes: tuple[torch.dtype | None, ...],
    dy_stride: int | None = None,
    relu: bool = False,
    cumulative: bool = False,
) -> LaunchPlan:
    """Return the plan of a kernel of :mod:`syncbn.kernels.triton.kernels`.

    Args:
        name: name of the kernel.
        layout: layout of x.
        device: device of the tensors.
        dtypes: dtypes of the tensors, x's first; None for an argument that is None.
        dy_stride: stride between the samples of dy; None for a kernel without dy.
        relu: True for a ReLU that is computed, or recomputed from x.
        cumulative: True for running statistics with ``momentum=None``.
    """
    kernel, dtype = getattr(kernels, name), dtypes[0]
    assert dtype is not None
    strides = {"x_stride": layout.stride, "stride": layout.dense_stride}
    if dy_stride is not None:
        strides["dy_stride"] = dy_stride
    if "splits" in kernel.arg_names:
        itemsize = dtype.itemsize * (1 if dy_stride is None else 2)
        multiprocessors = num_multiprocessors(device)
        tiling = tile_reduction(layout, dtype, [*strides.values()], itemsize, multiprocessors)
    else:
        tiling = tile_elementwise(layout, dtype, [*strides.values()])
    flags = {"RELU": relu, "CUMULATIVE": cumulative, "count": layout.batch * layout.space}
    constants = tiling.constants | strides | flags
    return LaunchPlan(kernel, tiling.programs, device, constants, tiling.workspace)
