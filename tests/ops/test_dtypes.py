"""Inputs, parameters and running statistics of any mix of floating dtypes."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.inference import example_weighted, prior_mix
from tests.device import seeded
from tests.kernel_cases import KERNELS, device_of, dtypes_of

EPS, MOMENTUM = 1e-3, 0.25
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Rounding of results of a dtype, relative to one and to the expected value.
ERROR = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BETWEEN = {"0": torch.full((4,), 0.1)}
RULES = (lambda net: prior_mix(net, 4), lambda net: example_weighted(net, 4, BETWEEN))


class Case(NamedTuple):
    """An input, its gradient and per-channel tensors, with independent dtypes."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    def wide(self) -> Case:
        return Case(*(t.detach().double().cpu() for t in self))


def _case(dtypes: tuple[torch.dtype, ...], device: torch.device) -> Case:
    kind, weight, bias, mean, var = dtypes
    generator = seeded(1)
    x, dy = torch.randn(2, 3, 4, 2, 3, generator=generator, dtype=torch.float64) + 0.5
    numbers = torch.rand(4, 4, generator=generator, dtype=torch.float64) + 0.5
    values = [t.to(k) for t, k in zip(numbers, (weight, bias, mean, var), strict=True)]
    return Case(*(t.to(device) for t in (x.to(kind), dy.to(kind), *values)))


def _mixes() -> list[tuple[torch.dtype, ...]]:
    """Return every pair of an input, parameters and statistics; and weight, bias that differ."""
    size = len(DTYPES)
    pairs = itertools.product(range(size), repeat=2)
    same = [(DTYPES[i], DTYPES[j], DTYPES[(i + j) % size]) for i, j in pairs]
    previous = {dtype: DTYPES[i - 1] for i, dtype in enumerate(DTYPES)}
    mixed = same[:: size + 1]
    return [
        *((x, p, p, s, s) for x, p, s in same),
        *((x, p, previous[p], s, previous[s]) for x, p, s in mixed),
    ]


def _formula(case: Case, training: bool) -> list[Tensor]:
    """Return y, dx, dweight, dbias and the moved statistics, float64."""
    x, dy, weight, bias, mean, var = case.wide()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    shape, count = (1, -1, 1, 1), x.numel() / x.shape[1]
    moved = [mean, var]
    if training:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        unbiased = var * count / (count - 1)
        moved = [old.lerp(new, MOMENTUM) for old, new in zip(moved, (mean, unbiased), strict=True)]
    y = (x - mean.view(shape)) / (var.view(shape) + EPS).sqrt()
    y = y * weight.view(shape) + bias.view(shape)
    return [y, *torch.autograd.grad(y, leaves, dy), *moved]


def _compare(case: Case, actual: list[Tensor], expected: list[Tensor]) -> None:
    dtypes = [t.dtype for t in (case.x, case.x, case.weight, case.bias, case.mean, case.var)]
    for value, limit, dtype in zip(actual, expected, dtypes, strict=True):
        assert value.dtype == dtype
        error = max(ERROR[dtype], ERROR[case.x.dtype])
        torch.testing.assert_close(value.double().cpu(), limit, rtol=error, atol=error)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients(kernel: str, training: bool) -> None:
    """Evaluation refused mixes that training accepts: "expected BFloat16 but found Float"."""
    for dtypes in _mixes():
        case = _case(dtypes, device_of(kernel))
        if training and case.x.dtype not in dtypes_of(kernel):
            continue
        expected = _formula(case, training)
        leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
        x, dy, weight, bias, mean, var = case
        arguments = x, mean, var, weight, bias, training, MOMENTUM, EPS
        y = syncbn.sync_batch_norm(*arguments, impl=kernel)
        _compare(case, [y, *torch.autograd.grad(y, leaves, dy), mean, var], expected)


def _layer(case: Case) -> Any:
    layer: Any = syncbn.SyncBatchNorm2d(4, EPS, MOMENTUM)
    layer.weight, layer.bias = nn.Parameter(case.weight), nn.Parameter(case.bias)
    layer.running_mean, layer.running_var = case.mean.clone(), case.var.clone()
    return layer.to(case.x.device)


def _second_order(x: Tensor, weight: Tensor, case: Case) -> tuple[Tensor, ...]:
    bias = case.bias.to(weight.dtype) if x.dtype == torch.float64 else case.bias
    y = syncbn.sync_batch_norm(x, None, None, weight, bias, True, 0.1, EPS)
    dy = case.dy.to(x.dtype)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    return torch.autograd.grad(dx, [x, weight], dy.flip(0))


def test_second_order_in_training() -> None:
    for dtypes in _mixes():
        case = _case(dtypes, torch.device("cpu"))
        x, weight = (t.clone().requires_grad_() for t in (case.x, case.weight))
        wide, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
        actual, expected = _second_order(x, weight, case), _second_order(wide, wide_weight, case)
        for value, limit, leaf in zip(actual, expected, (x, weight), strict=True):
            assert value.dtype == leaf.dtype
            error = 4 * max(ERROR[leaf.dtype], ERROR[x.dtype])
            torch.testing.assert_close(value.double(), limit, rtol=error, atol=error)


def test_inference_rules_and_calibration() -> None:
    for dtypes in _mixes():
        case = _case(dtypes, torch.device("cpu"))
        wide = case.wide()
        net, exact = nn.Sequential(_layer(case)).eval(), nn.Sequential(_layer(wide)).eval()
        error = max(ERROR[dtype] for dtype in dtypes)
        for rule in RULES:
            with rule(net), rule(exact):
                y, expected = net(case.x), exact(wide.x)
            assert y.dtype == case.x.dtype
            torch.testing.assert_close(y.double(), expected, rtol=error, atol=error)
        for model, x in ((net, case.x), (exact, wide.x)):
            syncbn.recalibrate(model, [x[:2], x[2:]])
        for name in ("running_mean", "running_var"):
            value, expected = (model.get_buffer(f"0.{name}") for model in (net, exact))
            torch.testing.assert_close(value.double(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("training", [True, False])
def test_dtypes_that_are_not_floating_are_refused(kind: torch.dtype, training: bool) -> None:
    x, mean, var = torch.randn(3, 4), torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match=f"got a weight of dtype {kind}; expected float16"):
        syncbn.sync_batch_norm(x, mean, var, torch.ones(4, dtype=kind), training=training)
