"""Rows of a Jacobian in one backward pass: vmap over gradients that arrive at a layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.autograd.functional import hessian, jacobian

import syncbn
from syncbn.distributed import collectives
from tests.device import seeded
from tests.formula import Formula
from tests.kernel_cases import KERNELS_AND_DTYPES, device_of, tolerance
from tests.ranks import Pool, Ranks

ROWS, SIZES = 5, [1, 2, 3]


def _batch() -> Tensor:
    return torch.randn(sum(SIZES), 3, 2, 2, dtype=torch.float64, generator=seeded(1))


def _rows() -> Tensor:
    return torch.randn(ROWS, *_batch().shape, dtype=torch.float64, generator=seeded(2))


def _layer(activation: str | None = None, kernel: str = "auto") -> Any:
    torch.manual_seed(0)
    layer: Any = syncbn.SyncBatchNorm2d(3, dtype=torch.float64, activation=activation)  # type: ignore[arg-type]
    layer.impl = kernel
    nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.uniform_(layer.bias, -0.5, 0.5)
    return layer.to(device_of(kernel))


def _by_vmap(y: Tensor, inputs: list[Tensor], rows: Tensor) -> list[Tensor]:
    return list(torch.func.vmap(lambda row: grad(y, inputs, row, retain_graph=True))(rows))


def _by_flag(y: Tensor, inputs: list[Tensor], rows: Tensor) -> list[Tensor]:
    return list(grad(y, inputs, rows, is_grads_batched=True, retain_graph=True))


def _one_by_one(y: Tensor, inputs: list[Tensor], rows: Tensor) -> list[Tensor]:
    gradients = zip(*(grad(y, inputs, row, retain_graph=True) for row in rows), strict=True)
    return [torch.stack(parts) for parts in gradients]


WAYS = {"vmap": _by_vmap, "flag": _by_flag}


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_AND_DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_one_rank(kernel: str, dtype: torch.dtype, way: str) -> None:
    """Kernels read the memory of dy, and batched tensors have none."""
    device, bound = device_of(kernel), 10 * tolerance(dtype)
    for activation, has_residual in product((None, "relu", "silu"), (False, True)):
        layer = _layer(activation, kernel)
        if dtype is not torch.float64:
            layer.float()
        x, rows = (t.to(device, dtype) for t in (_batch(), _rows()))
        x.requires_grad_()
        residual = (x.detach() * 2).cos().requires_grad_() if has_residual else None
        y = layer(x, residual)
        inputs = [x, layer.weight, layer.bias] + ([] if residual is None else [residual])
        expected = _one_by_one(y, inputs, rows)
        torch.testing.assert_close(WAYS[way](y, inputs, rows), expected, rtol=bound, atol=bound)
        assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("way", WAYS)
def test_frozen_inputs(way: str) -> None:
    layer, x = _layer(), _batch()
    layer.bias.requires_grad_(False)
    y = layer(x)
    actual = WAYS[way](y, [layer.weight], _rows())
    torch.testing.assert_close(actual, _one_by_one(y, [layer.weight], _rows()))


def _totals(net: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([net(x).pow(k).sum() for k in (2, 3)])


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "jacobian": lambda net, x: jacobian(partial(_totals, net), x, vectorize=True),
    "jacobian of a jacobian": lambda net, x: jacobian(
        lambda x: jacobian(partial(_totals, net), x, vectorize=True, create_graph=True).square(),
        x[:2],
        vectorize=True,
    ),
    "hessian": lambda net, x: hessian(lambda x: net(x).pow(3).sum(), x[:2], vectorize=True),
}


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("call", CALLS)
def test_whole_jacobians(call: str, activation: str | None) -> None:
    torch.manual_seed(0)
    x, formula = _batch(), Formula(3, activation).double()
    layer = syncbn.SyncBatchNorm2d(3, dtype=torch.float64, activation=activation)  # type: ignore[arg-type]
    torch.testing.assert_close(CALLS[call](layer, x), CALLS[call](formula, x))


COMBINATIONS = list(product(WAYS, (None, "leaky_relu", "gelu")))


def _over_ranks(rank: int) -> list[tuple[list[Tensor], int]]:
    results = []
    for way, activation in COMBINATIONS:
        layer, x = _layer(activation), _batch().split(SIZES)[rank].requires_grad_()
        y, rows = layer(x), _rows().split(SIZES, dim=1)[rank]
        start = collectives.start_all_reduce
        with patch.object(collectives, "start_all_reduce", wraps=start) as all_reduce:
            gradients = WAYS[way](y, [x, layer.weight, layer.bias], rows)
        results.append((gradients, all_reduce.call_count))
    return results


def test_rows_over_ranks_take_one_all_reduce(three_ranks: Ranks) -> None:
    answers = three_ranks.run(_over_ranks)
    for i, (_, activation) in enumerate(COMBINATIONS):
        layer, x = _layer(activation), _batch().requires_grad_()
        expected = _one_by_one(layer(x), [x, layer.weight, layer.bias], _rows())
        gradients, counts = zip(*(results[i] for results in answers), strict=True)
        assert counts == (1, 1, 1)
        dx, *parameters = zip(*gradients, strict=True)
        actual = [torch.cat(dx, dim=1), *(torch.stack(parts).sum(0) for parts in parameters)]
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def _second_on_a_rank(rank: int) -> Tensor:
    x = _batch().split(SIZES)[rank].requires_grad_()
    layer = _layer()
    (dx,) = grad(layer(x).pow(3).sum(), x, create_graph=True)
    rows = _rows().split(SIZES, dim=1)[rank]
    second: Tensor = grad(dx, x, rows, is_grads_batched=True)[0]
    return second


def test_second_order_over_ranks(pool: Pool) -> None:
    x, layer = _batch().requires_grad_(), Formula(3).double()
    state = _layer().state_dict()
    layer.load_state_dict({name: state[name] for name in ("weight", "bias")})
    (dx,) = grad(layer(x).pow(3).sum(), x, create_graph=True)
    actual = torch.cat(pool(3, "gloo").run(_second_on_a_rank), dim=1)
    torch.testing.assert_close(actual, _one_by_one(dx, [x], _rows())[0])
