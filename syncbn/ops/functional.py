"""The functional form: `torch.nn.functional.batch_norm` over a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from syncbn import modes
from syncbn.distributed.groups import active_group
from syncbn.kernels import select_kernel
from syncbn.kernels.activations import Activation, ActivationName, apply_activation
from syncbn.kernels.base import RunningStats
from syncbn.ops.composite import composite_batch_norm
from syncbn.ops.function import SyncBatchNormFunction
from syncbn.ops.masking import fill_masked
from syncbn.ops.params import BatchNormParams
from syncbn.ops.validation import (
    check_activation,
    check_input,
    check_mask,
    check_parameters,
)
from syncbn.ops.virtual_batch import (
    VirtualBatchNormFunction,
    divide_batch,
    first_derivatives_only,
    report_indivisible,
)


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
    *,
    residual: Tensor | None = None,
    activation: ActivationName | None = None,
    negative_slope: float = 0.01,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Batch normalization with the statistics of the batches of all ranks of a group.

    Arguments as for :func:`torch.nn.functional.batch_norm`. In training, every rank of
    the group must call this the same number of times in the same order, with or without data.

    Args:
        input: shape ``[N, C, *]``, float16, bfloat16, float32 or float64. N and the spatial sizes
            may differ between ranks; N may be zero. The other tensors may have any of these dtypes.
        running_mean: shape ``[C]``, updated in place in training, or None.
        running_var: shape ``[C]``, updated in place in training, unbiased, or None.
        weight: shape ``[C]``, or None for ones.
        bias: shape ``[C]``, or None for zeros.
        training: True to normalize with the batch and update the running statistics; False to
            normalize with the running statistics, without communication.
        momentum: weight of this batch in the running statistics.
        eps: constant added to the variance.
        process_group: ranks whose batches are normalized together; None for all ranks. Without an
            initialized torch.distributed, this process alone.
        residual: tensor added before the activation, as torch adds; fused if it has the shape and
            dtype of the input. Or None.
        activation: last operation: "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu" or
            None. ``relu(batch_norm(input) + residual)`` is one fused pass.
        negative_slope: slope of "leaky_relu" below zero, at least 0.
        mask: bool, True where the input counts, shape ``[N, *]`` or ``[N, 1, *]``, or broadcastable
            to it; None for everywhere. Output and gradients are zero elsewhere.
        impl: "auto", or the name of a kernel: "reference", "cpu", "triton", "aten_cuda".

    Returns:
        Tensor with the shape, dtype and memory layout (contiguous or channels_last) of the input.

    Raises:
        ValueError: an input that is not floating, has fewer than two dimensions or no channels;
            per-channel tensors of another length or device; an unknown activation or impl; a group
            without this rank; running statistics missing outside training; or, on CPU, a single
            value per channel in the whole group.
        RuntimeError: the transport failed or timed out, or the ranks are in different calls.

    Reference:
        Ioffe and Szegedy, Batch Normalization, 2015, section 3.
    """
    if not training and (running_mean is None or running_var is None):
        raise ValueError("got no running_mean or running_var; expected both when training is False")
    group = active_group(process_group) if training else None
    return batch_norm(
        input,
        weight,
        bias,
        RunningStats(running_mean, running_var, None, momentum),
        eps,
        group,
        use_batch_stats=training,
        residual=residual,
        activation=activation,
        negative_slope=negative_slope,
        mask=mask,
        impl=impl,
        label="" if torch.compiler.is_compiling() else "sync_batch_norm",
    )


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: RunningStats,
    eps: float,
    group: dist.ProcessGroup | None,
    *,
    use_batch_stats: bool,
    residual: Tensor | None,
    activation: ActivationName | None,
    negative_slope: float = 0.01,
    mask: Tensor | None,
    impl: str,
    label: str,
    update_running: bool = True,
    pending: Tensor | None = None,
    normalization_batch: int | None = None,
) -> Tensor:
    """Check the arguments, select the kernel and normalize: the body of layer and functional.

    Args:
        input: shape ``[N, C, *]``, any floating dtype.
        weight: shape ``[C]``, or None.
        bias: shape ``[C]``, or None.
        running: running statistics; read, or updated, by ``use_batch_stats``.
        eps: constant added to the variance.
        group: process group of more than one rank, or None for this process alone.
        use_batch_stats: True to normalize with the batch, False with the running statistics.
        residual: tensor added before the activation, or None.
        activation: name of the last operation, or None.
        negative_slope: slope of "leaky_relu" below zero.
        mask: bool mask, or None.
        impl: "auto" or the name of a kernel.
        label: name of the layer in error messages.
        update_running: False to leave the running statistics alone.
        pending: packed moments to which the batch's are added instead of an update, or None.
        normalization_batch: samples of a virtual batch (:mod:`syncbn.ops.virtual_batch`), or None.
    """
    check_input(input)
    check_parameters(input, weight, bias, running.mean, running.var, label)
    last = check_activation(activation, negative_slope)
    mask = None if mask is None else check_mask(input, mask)
    if not use_batch_stats:
        return eval_batch_norm(input, weight, bias, running, eps, residual, last, mask)
    kernel = select_kernel(impl, input, weight, bias, running.mean, running.var, residual)
    updated = running if update_running and pending is None else None
    adds = residual is None or _is_alike(input, residual)
    # The backward pass of a smooth activation reads the sum, so an operation of torch saves it.
    activates = adds and (residual is None or last is None or last.is_piecewise_linear)
    fill = None
    if mask is not None:
        input, fill = fill_masked(input, mask)
    params = BatchNormParams(
        eps, last if activates else None, updated, group, kernel, label, pending, fill
    )
    fused = residual if adds else None
    if normalization_batch is not None:
        y = _virtual_batch_norm(input, weight, bias, fused, params, normalization_batch)
    elif modes.in_functorch_transform() or modes.in_forward_ad():
        y = composite_batch_norm(input, weight, bias, fused, params)
    else:
        # torch.compile refuses one tensor as two arguments.
        fused = input.view_as(input) if fused is input else fused
        y = SyncBatchNormFunction.apply(input, weight, bias, fused, params)
    return finish_forward(y, None if adds else residual, None if activates else last, mask)


def _virtual_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    params: BatchNormParams,
    size: int,
) -> Tensor:
    if params.mask_fill is not None or params.pending is not None:
        got = "a mask" if params.pending is None else "accumulate_statistics"
        raise ValueError(
            f"{params.label}: got {got}; expected none for a layer with normalization_batch"
        )
    if modes.in_functorch_transform() or modes.in_forward_ad():
        raise first_derivatives_only(params.label)
    try:
        batches = divide_batch(len(input), size, params.group)
    except ValueError:
        report_indivisible(input, params)
        raise
    residual = input.view_as(input) if residual is input else residual
    y: Tensor = VirtualBatchNormFunction.apply(input, weight, bias, residual, params, batches)
    return y


def eval_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: RunningStats,
    eps: float,
    residual: Tensor | None,
    activation: Activation | None,
    mask: Tensor | None,
) -> Tensor:
    """Normalize with the running statistics; a residual of a wider dtype widens the output.

    Arguments as for :func:`batch_norm`, already checked.
    """
    if mask is not None:
        # Masked values must not reach the gradients of the parameters.
        input = torch.where(mask, input, 0)
    tensors = [running.mean, running.var, weight, bias]
    is_half = input.dtype in (torch.float16, torch.bfloat16)
    wide = torch.float32 if is_half else input.dtype
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) > 1 or not dtypes <= {input.dtype, wide}:
        # F.batch_norm accepts one dtype for all four: the input's, or float32 for half inputs.
        tensors = [None if tensor is None else tensor.to(wide) for tensor in tensors]
    mean, var, weight, bias = tensors
    y = F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)
    return finish_forward(y, residual, activation, mask)


def finish_forward(
    y: Tensor, residual: Tensor | None, activation: Activation | None, mask: Tensor | None
) -> Tensor:
    """Return ``act(y + residual)``, zero where masked, in unfused operations.

    Args:
        y: normalized tensor, shape ``[N, C, *]``.
        residual: tensor added to y, or None.
        activation: last operation, or None.
        mask: bool, broadcasts against y, or None.
    """
    y = y if residual is None else y + residual
    y = apply_activation(y, activation)
    return y if mask is None else torch.where(mask, y, 0)


def _is_alike(input: Tensor, residual: object) -> bool:
    """Return whether the kernels can add a residual."""
    if not isinstance(residual, Tensor):
        return False
    return (input.shape, input.dtype, input.device) == (
        residual.shape,
        residual.dtype,
        residual.device,
    )
