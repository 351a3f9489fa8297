from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from syncbn.kernels import REFERENCE, Kernel, cpu, select_kernel
from syncbn.kernels.aten_cuda import AtenCudaKernel
from tests.kernel_cases import device_of, levels
from tests.kernels.aten_on_cpu import aten_kernels_on_cpu

_LEVELS = [] if isinstance(cpu.load(), str) else levels()
_HAS_GPU = torch.cuda.is_available()


@pytest.fixture(
    params=[
        "reference",
        *(pytest.param(level, id=cpu.LEVELS[level.level]) for level in _LEVELS),
        "triton",
        pytest.param("aten_cuda", marks=pytest.mark.gpu)
        if _HAS_GPU
        else pytest.param("aten_cuda", id="aten_cuda on reference functions"),
    ]
)
def any_kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Return each kernel; ATen's without a GPU, too, on CPU definitions of its functions."""
    simulated = request.param == "aten_cuda" and not _HAS_GPU
    with aten_kernels_on_cpu() if simulated else nullcontext():
        match request.param:
            case "reference":
                yield REFERENCE
            case "aten_cuda":
                yield AtenCudaKernel()
            case "triton":
                yield select_kernel("triton", torch.empty(0, device=device_of("triton")))
            case level:
                yield level
