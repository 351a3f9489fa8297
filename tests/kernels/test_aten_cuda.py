"""The ATen CUDA kernel on a machine without a GPU.

Its methods are arithmetic around four ATen functions that exist on CUDA only. CPU definitions of
these, written from the formulas of ATen's CUDA source in the accumulation dtype, let that
arithmetic run here. The ATen functions are tested by the rows marked ``gpu``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from oracle import Case
from torch import Tensor

from syncbn.kernels.aten_cuda import AtenCudaKernel
from syncbn.kernels.coefficients import compute_dtype
from syncbn.moments import Moments
from tests.kernel_cases import DTYPES, tolerance
from tests.kernels.test_far_from_zero import check_kernel
from tests.kernels.test_kernels import LAYOUTS, SHAPES, check_module

CPU, KERNEL = torch.device("cpu"), AtenCudaKernel()


def _dims(x: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def _view(v: Tensor, x: Tensor) -> Tensor:
    return v.view(-1, *(1,) * (x.ndim - 2))


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values = x.to(compute_dtype(x.dtype))
    var, mean = torch.var_mean(values, _dims(x), correction=0)
    if eps == 0:
        return mean, torch.where(var == 0, 0.0, var.rsqrt())
    return mean, (var + eps).rsqrt()


def _elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    assert weight is not None
    assert bias is not None
    y = _view(weight, x) * ((x - _view(mean, x)) * _view(invstd, x)) + _view(bias, x)
    return torch.empty_like(x).copy_(y)


def _backward_reduce(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert dy.stride() == x.stride()
    gradient = dy.to(mean.dtype)
    sum_dy_xmu = (gradient * (x - _view(mean, x))).sum(_dims(x))
    return gradient.sum(_dims(x)), sum_dy_xmu, torch.empty(0), torch.empty(0)


def _backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    assert count.dtype == torch.int32
    norm = 1 / count.sum().to(mean.dtype)
    factor = _view(invstd * invstd * sum_dy_xmu * norm, x)
    scale = _view(invstd if weight is None else invstd * weight, x)
    dx = (dy - _view(sum_dy * norm, x) - (x - _view(mean, x)) * factor) * scale
    return torch.empty_like(x).copy_(dx)


@pytest.fixture(scope="module", autouse=True)
def _aten_kernels_on_cpu() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("batch_norm_stats", _stats, "CPU")
    library.impl("batch_norm_elemt", _elemt, "CPU")
    library.impl("batch_norm_backward_reduce", _backward_reduce, "CPU")
    library.impl("batch_norm_backward_elemt", _backward_elemt, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arithmetic_agrees_with_float64(dtype: torch.dtype, layout: str) -> None:
    for shape, affine in itertools.product(SHAPES, (True, False)):
        check_module(
            KERNEL, Case((shape,), dtype, layout, affine=affine), 2 * tolerance(dtype), CPU
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_arithmetic_keeps_precision_far_from_zero(layout: str, offset: float) -> None:
    for shape in SHAPES[-2:]:
        check_module(KERNEL, Case((shape,), layout=layout, offset=offset), 1e-6, CPU)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_arithmetic_of_float64_far_from_zero(layout: str) -> None:
    """Raw float64 sums lost the variance."""
    check_kernel(KERNEL, layout)


def test_arithmetic_with_an_outlier_in_the_first_sample() -> None:
    x = torch.randn(4, 8, 40, 40, dtype=torch.float64).add(1e4).float()
    x[0, :, 0, 0] = 0
    values = x.double().movedim(1, 0).reshape(8, -1)
    found = Moments.unpack(KERNEL.moments(x), 8)
    assert ((found.mean() - values.mean(1)) / values.std(1)).abs().max() <= 1e-6


def test_arithmetic_of_a_constant_channel() -> None:
    moments = KERNEL.moments(torch.full((4, 1, 3, 3), 7.0))
    assert torch.equal(moments, torch.tensor([7.0 * 36, 49.0 * 36, 36.0], dtype=torch.float64))
