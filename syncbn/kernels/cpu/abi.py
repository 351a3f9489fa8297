"""Arguments of the C++ kernels: addresses and numbers, packed into bytes.

One block of bytes instead of two dozen ctypes arguments, whose conversion would take longer than
the work on a small tensor.
"""

from __future__ import annotations

import math
import struct
from typing import TypeAlias

import torch
from torch import Tensor

from syncbn.kernels.base import RunningStats
from syncbn.kernels.layout import NCSLayout

#: Values of the enum DType in kernels.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
#: Address of the statistics; dtype of weight and bias, and their addresses; True for a ReLU.
Affine: TypeAlias = tuple[int, int, int, int, bool]
#: Dtype and addresses of the running statistics; address of the counter; momentum.
Running: TypeAlias = tuple[int, int, int, int, float]
NO_AFFINE = 0, 0, 0, 0, False
NO_RUNNING = 0, 0, 0, 0, 0.0
NO_OPERAND = 0, 0
# `Call` in kernels.h.
_CALL = struct.Struct("=25q2d")


def pack(
    level: int,
    x: Tensor,
    layout: NCSLayout,
    sums: int,
    affine: Affine = NO_AFFINE,
    gradients: tuple[int, int] = NO_OPERAND,
    operand: tuple[int, int] = NO_OPERAND,
    output: tuple[int, int] = NO_OPERAND,
    running: Running = NO_RUNNING,
    eps: float = 0.0,
) -> bytes:
    """Return the argument of a function of `cpu.cpp`.

    Args:
        level: instruction set, a position in ``syncbn.kernels.cpu.LEVELS``.
        x: input.
        layout: layout of x.
        sums: address of moments or gradient sums.
        affine: result of :func:`pack_affine`.
        gradients: addresses of dweight and dbias, of the dtype of weight and bias.
        operand: address and stride of a residual or of dy.
        output: address and stride of the output.
        running: result of :func:`pack_running`.
        eps: constant added to the variance.
    """
    batch, channels, space, stride, _ = layout
    shape = batch, channels, space, batch * channels * space
    head = level, torch.get_num_threads(), DTYPES[x.dtype], *shape
    source = address(x), stride
    return _CALL.pack(*head, *source, *affine, *gradients, sums, *operand, *output, *running, eps)


def address(t: Tensor | None) -> int:
    """Return the address of a tensor's values; 0 for None.

    Raises:
        RuntimeError: the tensor has no memory.
    """
    if t is None:
        return 0
    pointer = t.data_ptr()
    if pointer == 0 and t.numel() > 0:
        raise RuntimeError(
            f"got a {type(t).__name__} without memory; the kernel 'cpu' takes plain tensors "
            "(impl='reference' takes any)"
        )
    return pointer


def common_dtype(a: Tensor | None, b: Tensor | None) -> torch.dtype | None:
    """Return the dtype of two per-channel tensors; None if one call cannot read both."""
    if a is None or b is None:
        a = b = b if a is None else a
        if a is None or b is None:
            return torch.float32
    dtype = a.dtype
    is_plain = dtype is b.dtype and a.is_contiguous() and b.is_contiguous()
    return dtype if is_plain and not a.is_neg() and not b.is_neg() else None


def pack_affine(
    statistics: Tensor, weight: Tensor | None, bias: Tensor | None, relu: bool, dtype: torch.dtype
) -> Affine:
    """Return the per-channel arguments of a call.

    Args:
        statistics: ``[mean | invstd | count]``, float64, shape ``[2C + 1]``.
        weight: scale per channel of this dtype, shape ``[C]``, or None.
        bias: shift per channel of this dtype, shape ``[C]``, or None.
        relu: True for a ReLU that is computed, or recomputed from x.
        dtype: result of :func:`common_dtype`.
    """
    return statistics.data_ptr(), DTYPES[dtype], address(weight), address(bias), relu


def pack_running(running: RunningStats) -> Running | None:
    """Return the running statistics of a call; None if the library cannot update them."""
    mean, var, counter, momentum = running
    dtype = common_dtype(mean, var)
    if dtype is None or momentum != momentum:
        return None
    if counter is not None and (counter.dtype is not torch.int64 or not counter.is_cpu):
        return None
    # NaN stands for None in the library; a momentum that is NaN was refused above.
    share = math.nan if momentum is None else momentum
    return DTYPES[dtype], address(mean), address(var), address(counter), share
