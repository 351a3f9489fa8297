"""CPU definitions of the four ATen functions that exist on CUDA only.

The ATen kernel is arithmetic around these functions. Definitions from the formulas of ATen's CUDA
source, in the accumulation dtype, let that arithmetic run without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from syncbn.kernels.coefficients import compute_dtype, per_channel, reduced_dims


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values = x.to(compute_dtype(x.dtype))
    var, mean = torch.var_mean(values, reduced_dims(x), correction=0)
    if eps == 0:
        return mean, torch.where(var == 0, 0.0, var.rsqrt())
    return mean, (var + eps).rsqrt()


def _elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    assert weight is not None
    assert bias is not None
    xhat = (x - per_channel(mean, x)) * per_channel(invstd, x)
    return torch.empty_like(x).copy_(per_channel(weight, x) * xhat + per_channel(bias, x))


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
    gradient, dims = dy.to(mean.dtype), reduced_dims(x)
    sum_dy_xmu = (gradient * (x - per_channel(mean, x))).sum(dims)
    return gradient.sum(dims), sum_dy_xmu, torch.empty(0), torch.empty(0)


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
    slope = per_channel(invstd * invstd * sum_dy_xmu * norm, x)
    scale = per_channel(invstd if weight is None else invstd * weight, x)
    xmu = x - per_channel(mean, x)
    return torch.empty_like(x).copy_((dy - per_channel(sum_dy * norm, x) - xmu * slope) * scale)


@contextmanager
def aten_kernels_on_cpu() -> Iterator[None]:
    """Register the definitions."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("batch_norm_stats", _stats, "CPU")
    library.impl("batch_norm_elemt", _elemt, "CPU")
    library.impl("batch_norm_backward_reduce", _backward_reduce, "CPU")
    library.impl("batch_norm_backward_elemt", _backward_elemt, "CPU")
    yield
    library._destroy()
