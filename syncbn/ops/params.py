"""Non-tensor arguments of the autograd function, and the labels of its all-reduces."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from syncbn.kernels.base import Kernel, RunningStats
from syncbn.ops.masking import MaskFill


class BatchNormParams(NamedTuple):
    """Non-tensor arguments of a training-mode batch norm.

    Attributes:
        eps: constant added to the variance.
        relu: True for a ReLU as the last operation.
        running: running statistics to update, or None.
        group: process group of the all-reduces, or None for world size 1.
        kernel: local computations.
        label: name of the layer in error messages; empty under ``torch.compile``.
        pending: packed moments of earlier micro-batches, to which this batch's are added, or None.
        mask_fill: fill of masked positions, or None without a mask.
        call_number: number of the forward all-reduce in its group; 0 if uncounted.
    """

    eps: float
    relu: bool
    running: RunningStats | None
    group: dist.ProcessGroup | None
    kernel: Kernel
    label: str
    pending: Tensor | None = None
    mask_fill: MaskFill | None = None
    call_number: int = 0


def describe_all_reduce(params: BatchNormParams, direction: str, x: Tensor) -> str:
    """Return the label of an all-reduce; empty for a layer without a label.

    Args:
        params: arguments of the call.
        direction: "forward" or "backward".
        x: input of the call.
    """
    if not params.label:
        return ""
    call = f" of call {params.call_number}" if params.call_number else ""
    return f"{params.label} {direction}{call}, {x.dtype} input"
