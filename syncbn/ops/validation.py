"""Checks of the arguments of a batch norm, at the public edge."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from syncbn.kernels.activations import NAMES, Activation, ActivationName

_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_PLAIN = (Tensor, Parameter)
_PER_CHANNEL = ("running_mean", "running_var", "weight", "bias")


def check_input(input: Tensor) -> None:
    """Check an input's type, dtype and dimensions.

    Raises:
        ValueError: a DTensor, not of a floating dtype, fewer than two dimensions, or no channels.
    """
    if _is_sharded(input):
        raise ValueError(
            f"got a DTensor of shape {tuple(input.shape)} as input; expected the local part of the "
            "batch: pass x.to_local() of an x that is sharded along dimension 0, and the group of "
            "its mesh as process_group"
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
    label: str,
) -> None:
    """Check per-channel tensors against an input that has passed :func:`check_input`.

    Any mix of the four floating dtypes is accepted, in training and in evaluation.

    Args:
        input: input, shape ``[N, C, *]``.
        weight: scale per channel, or None.
        bias: shift per channel, or None.
        running_mean: running mean per channel, or None.
        running_var: running variance per channel, or None.
        label: name of the layer in error messages.

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
            message = _mismatch_message(input, _PER_CHANNEL[i], tensor)
            raise ValueError(f"{label}: {message}" if label else message)


def _is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    # Checked by attribute: importing the class takes half a second.
    return type(tensor) not in _PLAIN and hasattr(tensor, "full_tensor")


def _mismatch_message(input: Tensor, name: str, tensor: Tensor) -> str:
    """Return the error message for a per-channel tensor that does not fit the input."""
    channels = input.shape[1]
    if tensor.shape != (channels,):
        return (
            f"got an input of shape {tuple(input.shape)}; expected {tensor.numel()} channels in "
            f"dimension 1, as in {name} of shape {tuple(tensor.shape)}"
        )
    if tensor.device != input.device:
        return f"got an input on {input.device} and a {name} on {tensor.device}; move one of them"
    if _is_sharded(tensor):
        return (
            f"got a DTensor as {name}; expected a plain tensor with all channels on every rank: "
            "exclude synchronized layers from tensor parallelism (FSDP2 may shard them: it gathers "
            "parameters before the forward pass)"
        )
    return (
        f"got a {name} of dtype {tensor.dtype}; expected float16, bfloat16, float32 or float64: "
        "convert the layer"
    )


def check_activation(
    activation: ActivationName | None, negative_slope: Any = 0.01
) -> Activation | None:
    """Return the activation of a call.

    Args:
        activation: name, or None.
        negative_slope: slope of "leaky_relu" below zero; ignored by all other names.

    Raises:
        ValueError: an unknown name; a negative slope that is negative or not finite.
    """
    if activation is None:
        return None
    if activation not in NAMES:
        expected = ", ".join(map(repr, NAMES))
        raise ValueError(f"got activation {activation!r}; expected {expected} or None")
    if activation != "leaky_relu":
        return Activation(activation)
    is_number = isinstance(negative_slope, int | float) and not isinstance(negative_slope, bool)
    if not is_number or not 0 <= negative_slope < math.inf:
        raise ValueError(
            f"got negative_slope {negative_slope!r}; expected a finite number of at least 0"
        )
    return Activation(activation, negative_slope)


def check_normalization_batch(size: object) -> None:
    """Check the size of virtual batches.

    Raises:
        ValueError: neither None nor a positive integer.
    """
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"got normalization_batch {size!r}; expected a positive integer or None")


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
            f"shape {(shape[0], *shape[2:])} or {shape}, or one that broadcasts to it"
        )
    return wide
