"""The functional form: checks of the arguments and the choice of the kernel."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from syncbn import kernels
from syncbn.distributed.collectives import active_group
from syncbn.kernels import Running
from syncbn.ops.batch_norm import Call, finish, normalize

Activation = Literal["relu"]

_HALVES = (torch.float16, torch.bfloat16)
_FLOATING = frozenset((*_HALVES, torch.float32, torch.float64))
_PLAIN = (Tensor, Parameter)
_PER_CHANNEL = ("running_mean", "running_var", "weight", "bias")


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
    activation: Activation | None = None,
    mask: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Batch normalization with the statistics of the batches of every rank of a group.

    The arguments are those of :func:`torch.nn.functional.batch_norm`. In training every rank of the
    group must call this the same number of times in the same order, with or without data.

    Args:
        input: shape ``[N, C, *]``, float16, bfloat16, float32 or float64; N and the sizes behind C
            may differ between ranks, and N may be zero. The other tensors may have any of these
            dtypes, whatever the input's.
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
        residual: added to what is normalized, as torch adds; in the same pass over the memory if it
            has the shape and dtype of the input.
        activation: "relu", applied last, or None. ``relu(batch_norm(input) + residual)`` takes one
            pass over the memory.
        mask: bool, true where the input counts, shape ``[N, *]`` or ``[N, 1, *]``, or what
            broadcasts to it; None for everywhere. Elsewhere the output, and gradients, are zero.
        kernel: "auto", or the name of one module of :mod:`syncbn.kernels`.

    Returns:
        Shape, dtype and memory layout (contiguous or channels_last) of the input.

    Raises:
        ValueError: an input that is not floating, has fewer than two dimensions or no channels;
            tensors whose length is not C, that are not floating or on another device; an
            unknown activation; a group this rank is not in; running averages missing outside
            training; or, on CPU, a single value per channel in the whole group.
        RuntimeError: the transport failed or timed out, or the ranks are in different calls.

    Reference:
        Ioffe and Szegedy, Batch Normalization, 2015, section 3.
    """
    check_input(input)
    check_parameters(input, weight, bias, running_mean, running_var)
    check_activation(activation)
    mask = None if mask is None else check_mask(input, mask)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "got no running_mean or running_var; expected both when training is False"
            )
        numbers = running_mean, running_var, weight, bias, eps
        return evaluate(input, *numbers, residual, activation, mask)
    group = active_group(process_group)
    chosen = kernels.choose(kernel, input, weight, bias, running_mean, running_var, residual)
    running = Running(running_mean, running_var, None, momentum)
    call = Call(eps, activation == "relu", running, group, chosen, "sync_batch_norm")
    return normalize(input, weight, bias, residual, mask, call)


def evaluate(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: Activation | None,
    mask: Tensor | None,
) -> Tensor:
    """Normalize with the running averages; the arguments have been checked.

    The output has the dtype of the input.
    """
    if mask is not None:
        # Nor may it come into the gradients of the parameters.
        input = torch.where(mask, input, 0)
    numbers = [running_mean, running_var, weight, bias]
    wide = torch.float32 if input.dtype in _HALVES else input.dtype
    dtypes = {tensor.dtype for tensor in numbers if tensor is not None}
    if len(dtypes) > 1 or not dtypes <= {input.dtype, wide}:
        # F.batch_norm accepts one dtype for all four: the input's, or float32 for half inputs.
        numbers = [None if tensor is None else tensor.to(wide) for tensor in numbers]
    mean, var, weight, bias = numbers
    y = F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)
    return finish(y, residual, activation is not None, mask)


def check_input(input: Tensor) -> None:
    """Check an input's type, dtype and dimensions.

    Raises:
        ValueError: a DTensor, not of a floating dtype, fewer than two dimensions, or no channels.
    """
    if _is_sharded(input):
        raise ValueError(
            f"got a DTensor of shape {tuple(input.shape)} as input; expected this rank's part of "
            "the batch: give the layer x.to_local() of an x that is sharded along dimension 0, and "
            "the ranks of its mesh as process group"
        )
    if input.dtype not in _FLOATING:
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


def check_parameters(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:
    """Check per-channel tensors against an input that has passed :func:`check_input`.

    Any mix of the four floating dtypes is accepted, in training and in evaluation.

    Raises:
        ValueError: a length that is not C, another device than the input's, a dtype that is not
            floating, or a DTensor.
    """
    size, device = (input.shape[1],), input.device
    tensors = running_mean, running_var, weight, bias
    for i, tensor in enumerate(tensors):
        if tensor is None:
            continue
        fits = tensor.dtype in _FLOATING
        if not fits or tensor.shape != size or tensor.device != device or _is_sharded(tensor):
            raise ValueError(_misfit(input, _PER_CHANNEL[i], tensor))


def _is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    # By what it has: to import the class takes half a second.
    return type(tensor) not in _PLAIN and hasattr(tensor, "full_tensor")


def _misfit(input: Tensor, name: str, tensor: Tensor) -> str:
    """Return what is wrong with a tensor that is per channel, and what to do."""
    channels = input.shape[1]
    if tensor.shape != (channels,):
        return (
            f"got an input of shape {tuple(input.shape)}, that is {channels} channels, and a "
            f"{name} of shape {tuple(tensor.shape)}; expected ({channels},)"
        )
    if tensor.device != input.device:
        return f"got an input on {input.device} and a {name} on {tensor.device}; move one of them"
    if _is_sharded(tensor):
        return (
            f"got a DTensor as {name}; expected the whole of it on every rank, in a plain tensor: "
            "leave synchronized layers out of what shards or replicates modules (FSDP2 may shard "
            "them: it gathers them before they run)"
        )
    return (
        f"got a {name} of dtype {tensor.dtype}; expected float16, bfloat16, float32 or float64: "
        "convert the layer"
    )


def check_activation(activation: object) -> None:
    """Check an activation.

    Raises:
        ValueError: neither "relu" nor None.
    """
    if activation is not None and activation != "relu":
        raise ValueError(f"got activation {activation!r}; expected 'relu' or None")


def check_mask(input: Tensor, mask: Tensor) -> Tensor:
    """Return a mask that broadcasts against the input, with one channel.

    Raises:
        ValueError: not a bool tensor on the input's device that broadcasts to ``[N, *]`` or
            ``[N, 1, *]``.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(f"got a mask of type {type(mask).__name__}; expected a bool tensor")
    shape = (input.shape[0], 1, *input.shape[2:])
    wide = mask.unsqueeze(1) if mask.ndim == input.ndim - 1 else mask
    fits = wide.ndim == input.ndim and all(
        size in (1, whole) for size, whole in zip(wide.shape, shape, strict=True)
    )
    if not fits or mask.dtype != torch.bool or mask.device != input.device:
        raise ValueError(
            f"got a mask of shape {tuple(mask.shape)}, {mask.dtype}, on {mask.device} for an input "
            f"of shape {tuple(input.shape)} on {input.device}; expected torch.bool there, and the "
            f"shape {(shape[0], *shape[2:])} or {shape}, or what broadcasts to it"
        )
    return wide
