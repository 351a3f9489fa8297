"""The kernels that the layer tests run on, one row each, and calls of their methods."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from syncbn.kernels import REFERENCE, cpu
from syncbn.kernels.activations import Activation
from syncbn.kernels.base import Kernel, NormalizeArgs, OutputMask, Reduced, Saved
from syncbn.kernels.coefficients import split_statistics
from syncbn.kernels.reference import compute_statistics
from syncbn.moments import Moments, has_two_parts
from tests import interpreter

interpreter.begin()
EPS = 1e-5
RELU = Activation("relu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
needs_cpp = pytest.mark.skipif(isinstance(cpu.load(), str), reason=f"{cpu.load()}")
KERNELS = [
    pytest.param("reference", id="reference"),
    pytest.param("cpu", id="cpu", marks=needs_cpp),
    pytest.param("triton", id="triton"),
    pytest.param(
        "aten_cuda",
        id="aten_cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def dtypes_of(kernel: str | Kernel) -> list[torch.dtype]:
    """Return the input dtypes that a kernel serves."""
    is_triton = kernel == "triton" or type(kernel).__name__ == "TritonKernel"
    return DTYPES[1:] if is_triton else DTYPES


#: Every kernel with every input dtype that it serves.
KERNELS_AND_DTYPES = [
    pytest.param(*row.values, dtype, id=f"{row.id}-{dtype}", marks=row.marks)
    for row in KERNELS
    for dtype in dtypes_of(str(row.id))
]


def cpp() -> cpu.CPUKernel:
    """Return the C++ kernel."""
    kernel = cpu.load()
    assert isinstance(kernel, cpu.CPUKernel), kernel
    return kernel


def levels() -> list[cpu.CPUKernel]:
    """Return the C++ kernel for each instruction set of this processor."""
    best = cpp()
    return [cpu.CPUKernel(best.library, level) for level in range(best.level + 1)]


def normalize(kernel: Kernel, x: Tensor, saved: Saved, residual: Tensor | None = None) -> Tensor:
    """Return x normalized with given statistics: moments that yield them, and eps = 0."""
    mean, invstd, count = split_statistics(saved.statistics)
    centered = torch.zeros_like(mean), count * invstd**-2
    moments = Moments.from_pivot(count, mean, *centered, has_two_parts(x.dtype))
    args = NormalizeArgs(0.0, saved.weight, saved.bias, saved.activation)
    return kernel.normalize(x, moments.pack(), args, residual)[0]


def backward_reduce(
    kernel: Kernel, dy: Tensor, x: Tensor, saved: Saved, mask: OutputMask = (True,) * 4
) -> Reduced:
    """Return the reduction of a kernel for another x."""
    return kernel.backward_reduce(dy, saved._replace(x=x), mask)


def backward_elemt(
    kernel: Kernel, dy: Tensor, x: Tensor, saved: Saved, sums: Tensor, inplace_ok: bool = False
) -> Tensor:
    """Return dx of a kernel for another x and for given sums."""
    reduced = Reduced(sums, None, None, None, dy, inplace_ok)
    return kernel.backward_elemt(saved._replace(x=x), reduced, sums)


def totals(packed: Tensor, channels: int) -> Tensor:
    """Return ``[sum (C) | sum_sq (C) | count (1)]`` of packed moments of one part or two."""
    moments = Moments.unpack(packed, channels)
    return torch.cat([*moments.round_sums(), moments.count.reshape(1)])


def saved_for(x: Tensor, activation: Activation | None = None) -> Saved:
    """Return the saved values of a forward pass with a weight and a bias."""
    values = torch.linspace(0.5, 1.5, x.shape[1], dtype=torch.float64)
    weight, bias = values.to(x.dtype), (values - 1).to(x.dtype)
    moments = Moments.unpack(REFERENCE.moments(x.double()), x.shape[1])
    return Saved(x, weight, bias, compute_statistics(moments, NormalizeArgs(EPS)), None, activation)


def compute_all(kernel: Kernel, x: Tensor, dy: Tensor, saved: Saved) -> list[Tensor]:
    """Return the results of every method, where rounding cannot move a value through a ReLU."""
    sums = backward_reduce(kernel, dy, x, saved).sums
    y, local = kernel.forward_local(
        x, NormalizeArgs(EPS, saved.weight, saved.bias, saved.activation)
    )
    mask = True, True, True, False
    dx, dweight, dbias, _ = kernel.backward_local(dy, saved._replace(x=x), mask)
    results = [
        *(totals(kernel.moments(x), x.shape[1]), sums, normalize(kernel, x, saved)),
        *(backward_elemt(kernel, dy, x, saved, torch.ones_like(sums)), y, local.statistics),
        *(dbias, dweight, dx),
    ]
    return [t.double().flatten() for t in results if t is not None]


def is_equal_in_place(kernel: Kernel, x: Tensor, dy: Tensor, saved: Saved) -> bool:
    """Return whether dx has the same bits when it is written over dy."""
    sums = backward_reduce(kernel, dy, x, saved).sums
    inplace = backward_elemt(kernel, deepcopy(dy), x, saved, sums, inplace_ok=True)
    return torch.equal(inplace, backward_elemt(kernel, dy, x, saved, sums))


def device_of(kernel: str | Kernel) -> torch.device:
    """Return the device that a kernel is tested on."""
    if isinstance(kernel, Kernel):
        on_gpu = kernel.unsupported_reason(torch.empty(1, 1)) is not None
    else:
        on_gpu = kernel in ("aten_cuda", "triton")
    return torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest relative error allowed: the numerics bar, or half a unit of a half."""
    match dtype:
        case torch.float64:
            return 1e-12
        case torch.float32:
            return 1e-6
        case torch.float16:
            return 2**-11
        case _:
            return 2**-8
