"""The kernels every test of the layer runs on: one row each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from syncbn import kernels
from syncbn.kernels import Kernel, Transform, cpu

needs_cpp = pytest.mark.skipif(isinstance(cpu.load(), str), reason=f"{cpu.load()}")
KERNELS = [
    pytest.param("reference", id="reference"),
    pytest.param("cpu", id="cpu", marks=needs_cpp),
    pytest.param(
        "aten_cuda",
        id="aten_cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
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
    message = torch.cat([mean, how.invstd**-2 + mean**2, count.new_ones(1)]) * count
    return kernel.normalize(x, message, 0.0, how.weight, how.bias, residual, how.relu, None)[0]


def device_of(kernel: str) -> torch.device:
    """Return the device a kernel is tested on."""
    return torch.device("cuda" if kernel == "aten_cuda" else "cpu")


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
