"""What the C++ kernels are told of tensors: addresses and numbers, packed into bytes.

As arguments, ctypes would take longer to convert them than the work on a small tensor takes.
"""

from __future__ import annotations

import math
import struct
from typing import TypeAlias

import torch
from torch import Tensor

from syncbn.kernels.coefficients import Running, Transform
from syncbn.kernels.layout import Samples

#: The dtypes of kernels.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
#: The address of statistics, the dtype of weight and bias, their addresses, and whether to rectify.
Numbers: TypeAlias = tuple[int, int, int, int, bool]
#: The dtype of averages, their addresses and that of the counter, and the momentum.
Averages: TypeAlias = tuple[int, int, int, int, float]
NO_NUMBERS = 0, 0, 0, 0, False
NO_AVERAGES = 0, 0, 0, 0, 0.0
NO_OPERAND = 0, 0
# `Call` in cpu.cpp.
_CALL = struct.Struct("=24q2d")


def pack(
    level: int,
    x: Tensor,
    samples: Samples,
    packed: int,
    numbers: Numbers = NO_NUMBERS,
    gradients: tuple[int, int] = NO_OPERAND,
    pair: tuple[int, int] = NO_OPERAND,
    out: tuple[int, int] = NO_OPERAND,
    averages: Averages = NO_AVERAGES,
    eps: float = 0.0,
) -> bytes:
    """Return what a function of `cpu.cpp` is told.

    Args:
        level: of the instructions to use.
        x: the input.
        samples: what the kernels see in it.
        packed: the address of a message or of sums.
        numbers: from :func:`numbers`.
        gradients: addresses of dweight and dbias, which are of the dtype of weight and bias.
        pair: address and stride of a residual or of dy.
        out: address and stride of what is written.
        averages: from :func:`averages`.
        eps: added to the variance.
    """
    batch, channels, space, stride, _ = samples
    head = level, torch.get_num_threads(), DTYPES[x.dtype], batch, channels, space
    place = address(x), stride
    return _CALL.pack(*head, *place, *numbers, *gradients, packed, *pair, *out, *averages, eps)


def address(t: Tensor | None) -> int:
    """Return where a tensor's values are; 0 for none."""
    if t is None:
        return 0
    found = t.data_ptr()
    if found == 0 and t.numel() > 0:
        raise RuntimeError(
            f"got a {type(t).__name__} without memory of its own; the kernel 'cpu' takes plain "
            "tensors (kernel='reference' takes any)"
        )
    return found


def _common_dtype(a: Tensor | None, b: Tensor | None) -> torch.dtype | None:
    """Return the dtype of C numbers that can be read in one call; None if they cannot."""
    if a is None or b is None:
        a = b = b if a is None else a
        if a is None or b is None:
            return torch.float32
    dtype = a.dtype
    plain = dtype is b.dtype and a.is_contiguous() and b.is_contiguous()
    return dtype if plain and not a.is_neg() and not b.is_neg() else None


def numbers(t: Transform) -> tuple[Transform, Numbers]:
    """Return t with a weight and a bias that can be read in one call, and what the call takes."""
    dtype = _common_dtype(t.weight, t.bias)
    if dtype is None:
        weight, bias = (
            None if v is None else v.resolve_neg().double().contiguous() for v in (t.weight, t.bias)
        )
        t, dtype = Transform(t.statistics, weight, bias, t.relu), torch.float64
    addresses = address(t.weight), address(t.bias)
    return t, (t.statistics.data_ptr(), DTYPES[dtype], *addresses, t.relu)


def averages(running: Running) -> Averages | None:
    """Return what a call takes; None if it cannot take these averages."""
    mean, var, tracked, momentum = running
    dtype = _common_dtype(mean, var)
    counter = tracked is None or (tracked.dtype is torch.int64 and tracked.device.type == "cpu")
    if dtype is None or not counter or momentum != momentum:
        return None
    # To the library NaN is None; a momentum that is NaN was left to the reference above.
    weight = math.nan if momentum is None else momentum
    return DTYPES[dtype], address(mean), address(var), address(tracked), weight
