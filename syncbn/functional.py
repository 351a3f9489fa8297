"""The functional form: checks of the arguments and the choice of the kernel."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from syncbn import kernels
from syncbn.autograd import SyncBatchNormFunction
from syncbn.distributed.collectives import communicating_group
from syncbn.moments import Moments
from syncbn.running import update_running_statistics


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
    kernel: str = "auto",
) -> Tensor:
    """Batch normalization with the statistics of the batches of every rank of a group.

    The arguments are those of :func:`torch.nn.functional.batch_norm`. In training every rank of the
    group must call this the same number of times in the same order, with or without data.

    Args:
        input: shape ``[N, C, *]``, a floating dtype; N and the sizes behind C may differ between
            ranks, and N may be zero.
        running_mean: shape ``[C]``; updated in place in training. None to keep no average.
        running_var: shape ``[C]``; updated in place in training, with the unbiased variance.
        weight: shape ``[C]``, or None for ones.
        bias: shape ``[C]``, or None for zeros.
        training: normalize with the batch and update the running averages; otherwise normalize
            with the running averages, without communication.
        momentum: weight of this batch in the running averages.
        eps: added to the variance.
        process_group: the ranks whose batches count as one; None for all ranks. Without an
            initialized torch.distributed this process is alone.
        kernel: "auto", or the name of one module of :mod:`syncbn.kernels`.

    Returns:
        Shape, dtype and memory layout (contiguous or channels_last) of the input.

    Raises:
        ValueError: an input that is not floating, has fewer than two dimensions or no channels;
            tensors whose length is not C or whose dtype does not go with the input's; a group this
            rank is not in; running averages missing outside training; or, on CPU, a single value
            per channel in the whole group.
        RuntimeError: the transport failed or timed out, or the ranks disagree (debug level).

    Reference:
        Ioffe and Szegedy, Batch Normalization, 2015, section 3.
    """
    check_input(input)
    check_parameters(
        input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "got no running_mean or running_var; expected both when training is False"
            )
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    group = communicating_group(process_group)
    output, moments = batch_norm_with_moments(input, weight, bias, eps, group, kernel)
    update_running_statistics(running_mean, running_var, moments, momentum)
    return output


def batch_norm_with_moments(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: dist.ProcessGroup | None,
    kernel: str = "auto",
    label: str = "sync_batch_norm",
) -> tuple[Tensor, Moments]:
    """Normalize with the group's batch and return its moments, for whoever keeps the averages.

    Args:
        input: checked by :func:`check_input`.
        weight: shape ``[C]`` or None.
        bias: shape ``[C]`` or None.
        eps: added to the variance.
        group: from :func:`~syncbn.distributed.collectives.communicating_group`; None if alone.
        kernel: see :func:`sync_batch_norm`.
        label: names the layer in error messages.

    Raises:
        ValueError: on CPU, a single value per channel in the whole group.
    """
    chosen = kernels.choose(kernel, input)
    output, message = SyncBatchNormFunction.apply(input, weight, bias, eps, group, chosen, label)
    moments = Moments.unpack(message)
    # Elsewhere reading the count would stall the device; there running.py keeps NaN out.
    if input.device.type == "cpu" and moments.count == 1:
        raise ValueError(
            f"{label}: got a single value per channel in the whole group (input of shape "
            f"{tuple(input.shape)} on this rank); expected at least two in training, since the "
            "variance of one value is zero"
        )
    return output, moments


def check_input(input: Tensor) -> None:
    """Check an input's dtype and dimensions.

    Raises:
        ValueError: not of a floating dtype, fewer than two dimensions, or no channels.
    """
    if not input.is_floating_point():
        raise ValueError(
            f"got an input of dtype {input.dtype}; expected float16, bfloat16, float32 or float64"
        )
    if input.ndim < 2:
        raise ValueError(
            f"got an input of shape {tuple(input.shape)}; expected at least 2 dimensions [N, C, *]"
        )
    if input.shape[1] == 0:
        raise ValueError(
            f"got an input of shape {tuple(input.shape)} without channels; expected [N, C, *] "
            "with C >= 1"
        )


def check_parameters(input: Tensor, **per_channel: Tensor | None) -> None:
    """Check what is per channel against an input that has passed :func:`check_input`.

    Dtypes must be those that torch takes in evaluation, so that a model that trains also runs.

    Raises:
        ValueError: a length that is not C, or a dtype other than the input's (float32 goes with
            half inputs, too).
    """
    channels = input.shape[1]
    half = input.dtype in (torch.float16, torch.bfloat16)
    for name, tensor in per_channel.items():
        if tensor is None:
            continue
        if tensor.shape != (channels,):
            raise ValueError(
                f"got an input of shape {tuple(input.shape)}, that is {channels} channels, and a "
                f"{name} of shape {tuple(tensor.shape)}; expected ({channels},)"
            )
        if tensor.dtype != input.dtype and not (half and tensor.dtype == torch.float32):
            allowed = f"{input.dtype} or torch.float32" if half else f"{input.dtype}"
            raise ValueError(
                f"got an input of dtype {input.dtype} and a {name} of dtype {tensor.dtype}; "
                f"expected {allowed}: convert the input or the layer"
            )
