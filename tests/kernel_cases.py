"""The kernels every test of the layer runs on: one row each."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from syncbn import kernels
from syncbn.kernels import Forward, Kernel, Transform, alone, cpu, reference
from syncbn.moments import Moments, has_two_parts
from tests import interpreter

interpreter.begin()
EPS = 1e-5
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


def dtypes_of(kernel: str) -> list[torch.dtype]:
    """Return the input dtypes that a kernel serves."""
    return DTYPES[1:] if kernel == "triton" else DTYPES


#: Every kernel with every input dtype that it serves.
KERNELS_AND_DTYPES = [
    pytest.param(*row.values, dtype, id=f"{row.id}-{dtype}", marks=row.marks)
    for row in KERNELS
    for dtype in dtypes_of(str(row.id))
]


def cpp() -> cpu.CPU:
    """Return the C++ kernels, which are there."""
    found = cpu.load()
    assert isinstance(found, cpu.CPU), found
    return found


def levels() -> list[cpu.CPU]:
    """Return the C++ kernels for each instruction set that this processor has."""
    best = cpp()
    return [cpu.CPU(best.library, level) for level in range(best.level + 1)]


def on_its_device(kernel: str) -> Kernel:
    """Return a kernel by its name."""
    return kernels.choose(kernel, torch.empty(0, device=device_of(kernel)))


def normalize(kernel: Kernel, x: Tensor, how: Transform, residual: Tensor | None = None) -> Tensor:
    """Return x normalized with given statistics, by way of a message that has them, and eps = 0."""
    count, mean = how.values, how.mean
    around = torch.zeros_like(mean), count * how.invstd**-2
    moments = Moments.from_pivot(count, mean, *around, has_two_parts(x.dtype))
    forward = Forward(0.0, how.weight, how.bias, how.relu)
    return kernel.normalize(x, moments.pack(), forward, residual)[0]


def totals(message: Tensor, channels: int) -> Tensor:
    """Return ``[sum (C) | sum_sq (C) | count (1)]`` of packed moments of one part or two."""
    found = Moments.unpack(message, channels)
    return torch.cat([*found.round_sums(), found.count.reshape(1)])


def transform(x: Tensor, relu: bool = False) -> Transform:
    """Return the transform of a batch, with a weight and a bias."""
    numbers = torch.linspace(0.5, 1.5, x.shape[1], dtype=torch.float64)
    weight, bias = numbers.to(x.dtype), (numbers - 1).to(x.dtype)
    moments = Moments.unpack(reference.moments(x.double()), x.shape[1])
    return Transform(reference.statistics(moments, EPS), weight, bias, relu)


def everything(kernel: Kernel, x: Tensor, dy: Tensor, how: Transform) -> list[Tensor]:
    """Return what the functions find, where rounding cannot move a value through a ReLU."""
    message = totals(kernel.moments(x), x.shape[1])
    sums, _, _ = kernel.backward_reduce(dy, x, how)
    given = torch.ones_like(sums)
    found = [message, sums, normalize(kernel, x, how), kernel.backward_elemt(dy, x, how, given)]
    found += alone.forward(kernel, x, Forward(EPS, how.weight, how.bias, how.relu))
    apart, dx, _, _ = alone.backward(kernel, dy, x, how, (None, None), keep_sums=True)
    assert apart is not None
    found += apart, dx
    return [t.double().flatten() for t in found]


def is_same_over_dy(kernel: Kernel, x: Tensor, dy: Tensor, how: Transform) -> bool:
    """Return whether dx is the same, to the bit, where it may be written over dy."""
    sums, _, _ = kernel.backward_reduce(dy, x, how)
    functions = (
        lambda dy, over: kernel.backward_elemt(dy, x, how, sums, over),
        lambda dy, over: alone.backward(kernel, dy, x, how, (None, None), over)[1],
    )
    return all(torch.equal(f(deepcopy(dy), True), f(dy, False)) for f in functions)


def device_of(kernel: str) -> torch.device:
    """Return the device a kernel is tested on."""
    on_gpu = kernel == "aten_cuda" or (kernel == "triton" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


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
