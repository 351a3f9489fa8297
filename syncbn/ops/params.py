"""Non-tensor arguments of a training-mode batch norm, and the steps that use them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import modes
from syncbn.kernels.activations import Activation
from syncbn.kernels.base import Kernel, RunningStats
from syncbn.ops.masking import MaskFill, masked_moments


class BatchNormParams(NamedTuple):
    """Non-tensor arguments of a training-mode batch norm.

    Attributes:
        eps: constant added to the variance.
        activation: last operation, or None.
        running: running statistics to update, or None.
        group: process group of the all-reduces, or None for world size 1.
        kernel: local computations.
        label: name of the layer in error messages; empty under ``torch.compile``.
        pending: packed moments of earlier micro-batches, to which this batch's are added, or None.
        mask_fill: fill of masked positions, or None without a mask.
        call_number: number of checked all-reduces of the group so far; 0 if uncounted.
    """

    eps: float
    activation: Activation | None
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


def compute_moments(kernel: Kernel, x: Tensor, params: BatchNormParams) -> Tensor:
    """Return this rank's packed moments of the unmasked values."""
    if params.mask_fill is None:
        return kernel.moments(x)
    return masked_moments(kernel.moments, x, params.mask_fill)


def check_value_count(x: Tensor, count: Tensor, params: BatchNormParams) -> None:
    """Check that the group has at least two values per channel, on CPU.

    Other devices would synchronize. Everywhere, kernels keep such a batch out of the statistics.

    Args:
        x: input, shape ``[N, C, *]``.
        count: all-reduced number of values per channel, scalar.
        params: arguments of the call.

    Raises:
        ValueError: there is a single value.
    """
    if torch.compiler.is_compiling() or not x.is_cpu or modes.num_dispatch_modes():
        return
    if count.item() == 1:
        raise ValueError(
            f"{params.label}: got a single value per channel in the whole group (input of shape "
            f"{tuple(x.shape)} on this rank); expected at least two in training, since the "
            "variance of one value is zero"
        )
