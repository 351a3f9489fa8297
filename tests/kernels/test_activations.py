"""Activations of every kernel against torch's: values, gradients, NaN and infinities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import syncbn
from syncbn.kernels import Kernel
from syncbn.kernels.activations import NAMES, Activation, ActivationName
from syncbn.kernels.aten_cuda import AtenCudaKernel
from syncbn.kernels.base import NormalizeArgs, Saved
from syncbn.kernels.reference import ReferenceKernel
from tests.kernel_cases import EPS, device_of, dtypes_of, normalize, tolerance

SLOPE = 0.1
ACTIVATIONS = [Activation(name, SLOPE if name == "leaky_relu" else 0.0) for name in NAMES]
LINEAR = [activation for activation in ACTIVATIONS if activation.is_piecewise_linear]
SHAPES = [(5, 7, 3, 19), (6, 70), (4, 7, 3, 3)]


def torch_activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    """Return the function of torch.nn.functional."""
    function: Any = getattr(F, activation.name)
    if activation.name == "leaky_relu":
        return lambda z: function(z, activation.negative_slope)
    return lambda z: function(z)


def compute(
    kernel: Kernel, activation: Activation, x: Tensor, dy: Tensor, residual: Tensor | None
) -> list[Tensor]:
    """Return the output, and the gradients of x, weight and bias, of a kernel for one rank."""
    weight, bias = torch.linspace(-1, 2, 2 * x.shape[1], device=x.device).to(x.dtype).chunk(2)
    args = NormalizeArgs(EPS, weight.contiguous(), bias.contiguous(), activation)
    y, saved = kernel.normalize(x, kernel.moments(x), args, residual)
    local, _ = kernel.forward_local(x, args, residual)
    torch.testing.assert_close(local, y)
    mask = True, True, True, residual is not None
    gradients = kernel.backward_local(dy, saved, mask)
    return [y, *(g for g in gradients if g is not None)]


def expect(activation: Activation, x: Tensor, dy: Tensor, residual: Tensor | None) -> list[Tensor]:
    """Return the same values of torch's formulas in float64; set dy to zero near jumps."""
    weight, bias = torch.linspace(-1, 2, 2 * x.shape[1]).to(x.dtype).chunk(2)
    leaves = [t.cpu().double().requires_grad_() for t in (x, weight, bias)]
    leaves += [] if residual is None else [residual.cpu().double().requires_grad_()]
    z = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, eps=EPS)
    z = z if residual is None else z + leaves[3]
    # ATen rounds z to a half type: no gradient where that may move it over a jump of a derivative.
    jumps = torch.tensor([0.0, 3.0, -3.0, 6.0], dtype=torch.float64)
    dy[((z.detach()[..., None] - jumps).abs() < 0.05).any(-1).to(dy.device)] = 0
    y = torch_activation(activation)(z)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.cpu().double())]


@pytest.mark.parametrize(
    ("activation", "residual"), [*product(ACTIVATIONS, [False]), *product(LINEAR, [True])]
)
def test_agrees_with_float64(any_kernel: Kernel, activation: Activation, residual: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes_of(any_kernel):
        for shape in SHAPES:
            x, dy, r = (
                torch.randn(shape, generator=generator).to(device_of(any_kernel), dtype)
                for _ in range(3)
            )
            if shape[-1] == 3:
                x = x.to(memory_format=torch.channels_last)
            expected = expect(activation, x, dy, r if residual else None)
            actual = compute(any_kernel, activation, x, dy, r if residual else None)
            for a, b in zip(actual, expected, strict=True):
                error = (a.cpu().double() - b).abs().max() / b.abs().max()
                assert error <= 4 * tolerance(dtype), (dtype, shape, error)


EDGES = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.0, -3.0, 6.0, 1e-30, -1e-30]
EDGES += [100.0, -100.0, 88.6, -88.6, -87.0, 20.0, -20.0]


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")  # Triton's interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=NAMES)
def test_special_values_are_those_of_torch(any_kernel: Kernel, activation: Activation) -> None:
    """Statistics of mean 0 and variance 1: the activation takes x itself.

    Values of float64: in float32 torch's gelu(inf) is NaN on processors with AVX-512 and infinity
    elsewhere, and so it is in the kernels of plain torch.
    """
    device = device_of(any_kernel)
    x = torch.tensor(EDGES, device=device).repeat(2, 1, 3)
    statistics = torch.tensor([0.0, 1.0, 102.0], dtype=torch.float64, device=device)
    saved = Saved(x, None, None, statistics, None, activation)
    leaf = x.cpu().double().requires_grad_()
    y = torch_activation(activation)(leaf)
    (dz,) = torch.autograd.grad(y.sum(), leaf)
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6, equal_nan=True)
    check = partial(close, check_dtype=False)
    actual = normalize(any_kernel, x, saved).cpu()
    if isinstance(any_kernel, ReferenceKernel | AtenCudaKernel) and activation.name == "gelu":
        actual[x.cpu() == float("inf")] = float("inf")
    check(actual, y.detach())
    ones = torch.ones_like(x)
    reduced = any_kernel.backward_reduce(ones, saved, (True, False, False, False))
    dx = any_kernel.backward_elemt(saved, reduced, torch.zeros(2, dtype=torch.float64).to(device))
    # The coefficients are zero, and their product with x is NaN at infinity.
    finite = x.cpu().isfinite()
    check(dx.cpu()[finite], dz[finite])
    check(reduced.sums[0].cpu(), dz.double().sum())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=NAMES)
def test_accuracy_over_the_whole_range(any_kernel: Kernel, activation: Activation) -> None:
    """Errors of the approximations of exp and the normal distribution, relative to max(|z|, 1)."""
    device = device_of(any_kernel)
    x = torch.linspace(-30, 30, 60001, device=device).view(1, 1, -1)
    statistics = torch.tensor([0.0, 1.0, 60001.0], dtype=torch.float64, device=device)
    saved = Saved(x, None, None, statistics, None, activation)
    leaf = x.cpu().double().requires_grad_()
    y = torch_activation(activation)(leaf)
    (dz,) = torch.autograd.grad(y.sum(), leaf)
    unit = leaf.detach().abs().clamp(min=1)
    error = (normalize(any_kernel, x, saved).cpu().double() - y.detach()).abs() / unit
    assert error.max() <= 3e-7
    reduced = any_kernel.backward_reduce(torch.ones_like(x), saved, (True, False, False, False))
    zeros = torch.zeros(2, dtype=torch.float64, device=device)
    dx = any_kernel.backward_elemt(saved, reduced, zeros).cpu().double()
    # Derivatives that jump do so within a rounding of z.
    smooth = (leaf.detach().abs() - torch.tensor([0.0, 3.0, 6.0]).view(3, 1, 1, 1)).abs() > 1e-5
    assert ((dx - dz).abs() * smooth.all(0)).max() <= 1e-6


@pytest.mark.parametrize(
    ("activation", "negative_slope", "message"),
    [
        ("swish", 0.01, "got activation 'swish'; expected 'relu', 'relu6', 'leaky_relu'"),
        ("leaky_relu", -0.1, "got negative_slope -0.1; expected a finite number of at least 0"),
        ("leaky_relu", float("nan"), "got negative_slope nan"),
        ("leaky_relu", "0.1", "got negative_slope '0.1'"),
    ],
)
def test_bad_arguments(activation: Any, negative_slope: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        syncbn.SyncBatchNorm2d(3, activation=activation, negative_slope=negative_slope)
    layer = syncbn.SyncBatchNorm2d(3, activation="leaky_relu")
    name, value = ("negative_slope", negative_slope)
    if activation != "leaky_relu":
        name, value = "activation", activation
    with pytest.raises(ValueError, match=message):
        setattr(layer, name, value)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=message):
        syncbn.sync_batch_norm(
            x, None, None, training=True, activation=activation, negative_slope=negative_slope
        )


@pytest.mark.parametrize("name", NAMES)
def test_layer_in_training_and_evaluation(name: ActivationName) -> None:
    activation = Activation(name, SLOPE)
    layer = syncbn.SyncBatchNorm2d(3, activation=name, negative_slope=SLOPE).double()
    plain = torch.nn.BatchNorm2d(3).double()
    x, residual = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    mask = torch.ones(4, 5, 5, dtype=torch.bool)
    for _ in range(2):
        expected = torch_activation(activation)(plain(x) + residual)
        torch.testing.assert_close(layer(x, residual, mask), expected)
        layer.eval()
        plain.eval()
    assert (f"negative_slope={SLOPE}" in repr(layer)) == (name == "leaky_relu")
