"""The kernels every test of the layer runs on: one row each."""

from __future__ import annotations

import pytest
import torch

KERNELS = [
    pytest.param("reference", id="reference"),
    pytest.param("blocked", id="blocked"),
    pytest.param("aten_cpu", id="aten_cpu"),
    pytest.param(
        "aten_cuda",
        id="aten_cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


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
