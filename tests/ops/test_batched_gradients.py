"""Rows of a Jacobian in one backward pass: vmap over gradients that arrive at a layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import grad
from torch.autograd.functional import hessian, jacobian

import syncbn
from tests.device import seeded
from tests.formula import Formula
from tests.kernel_cases import KERNELS, device_of
from tests.ranks import Ranks

ROWS, SIZES = 5, [1, 2, 3]


def _batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sum(SIZES), 3, 2, 2, dtype=torch.float64, generator=seeded(1)).to(dtype)


def _rows(dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randn(ROWS, *_batch().shape, dtype=torch.float64, generator=seeded(2))
    return rows.to(dtype)


def _layer(
    activation: str | None = None, kernel: str = "auto", dtype: torch.dtype = torch.float64
) -> Any:
    torch.manual_seed(0)
    layer: Any = syncbn.SyncBatchNorm2d(3, dtype=dtype, activation=activation)  # type: ignore[arg-type]
    layer.impl = kernel
    nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.uniform_(layer.bias, -0.5, 0.5)
    return layer.to(device_of(kernel))


def _by_vmap(y: Tensor, inputs: list[Tensor], rows: Tensor) -> list[Tensor]:
    return list(torch.func.vmap(lambda row: grad(y, inputs, row, retain_graph=True))(rows))


def _by_flag(y: Tensor, inputs: list[Tensor], rows: Tensor) -> list[Tensor]:
    return list(grad(y, inputs, rows, is_grads_batched=True, retain_graph=True))


def _one_by_one(y: Tensor, inputs: list[Tensor], rows: Tensor) -> list[Tensor]:
    found = zip(*(grad(y, inputs, row, retain_graph=True) for row in rows), strict=True)
    return [torch.stack(parts) for parts in found]


WAYS = {"vmap": _by_vmap, "flag": _by_flag}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_one_rank(kernel: str, activation: str, residual: bool, way: str) -> None:
    """Kernels read the memory of dy, and batched tensors have none."""
    device, dtype = device_of(kernel), torch.float32 if kernel == "triton" else torch.float64
    layer = _layer(activation, kernel, dtype)
    x, rows = _batch(dtype).to(device).requires_grad_(), _rows(dtype).to(device)
    added = (x.detach() * 2).cos().requires_grad_() if residual else None
    y = layer(x, added)
    inputs = [x, layer.weight, layer.bias] + ([] if added is None else [added])
    found = WAYS[way](y, inputs, rows)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    expected = _one_by_one(y, inputs, rows)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("way", WAYS)
def test_parts_without_a_gradient(way: str) -> None:
    layer, x = _layer(), _batch()
    layer.bias.requires_grad_(False)
    y = layer(x)
    found = WAYS[way](y, [layer.weight], _rows())
    torch.testing.assert_close(found, _one_by_one(y, [layer.weight], _rows()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_rows_keep_the_dtype(way: str, dtype: torch.dtype) -> None:
    layer, x = _layer().float(), _batch().to(dtype).requires_grad_()
    y, inputs = layer(x), [x, layer.weight, layer.bias]
    rows = _rows().to(dtype)
    found, wanted = WAYS[way](y, inputs, rows), _one_by_one(y, inputs, rows)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


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


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("call", CALLS)
def test_whole_jacobians(call: str, activation: str | None) -> None:
    torch.manual_seed(0)
    x, formula = _batch(), Formula(3, activation).double()
    layer = syncbn.SyncBatchNorm2d(3, dtype=torch.float64, activation=activation)  # type: ignore[arg-type]
    torch.testing.assert_close(CALLS[call](layer, x), CALLS[call](formula, x))


def _on_a_rank(rank: int, way: str, activation: str | None) -> tuple[list[Tensor], int]:
    calls = 0
    real = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*args, **kwargs)

    layer, x = _layer(activation), _batch().split(SIZES)[rank].requires_grad_()
    y = layer(x)
    rows = _rows().split(SIZES, dim=1)[rank]
    dist.all_reduce = counted
    try:
        found = WAYS[way](y, [x, layer.weight, layer.bias], rows)
    finally:
        dist.all_reduce = real
    return found, calls


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("way", WAYS)
def test_rows_over_ranks_take_one_all_reduce(
    three_ranks: Ranks, way: str, activation: str | None
) -> None:
    layer, x = _layer(activation), _batch().requires_grad_()
    wanted = _one_by_one(layer(x), [x, layer.weight, layer.bias], _rows())
    answers = three_ranks.run(_on_a_rank, way, activation)
    assert [calls for _, calls in answers] == [1, 1, 1]
    dx = torch.cat([found[0] for found, _ in answers], dim=1)
    torch.testing.assert_close(dx, wanted[0], rtol=1e-10, atol=1e-12)
    for i in (1, 2):
        total = torch.stack([found[i] for found, _ in answers]).sum(0)
        torch.testing.assert_close(total, wanted[i], rtol=1e-10, atol=1e-12)


def _second_on_a_rank(rank: int) -> Tensor:
    x = _batch().split(SIZES)[rank].requires_grad_()
    layer = _layer()
    (dx,) = grad(layer(x).pow(3).sum(), x, create_graph=True)
    rows = _rows().split(SIZES, dim=1)[rank]
    found: Tensor = grad(dx, x, rows, is_grads_batched=True)[0]
    return found


def test_second_order_over_ranks(three_ranks: Ranks) -> None:
    x, layer = _batch().requires_grad_(), Formula(3).double()
    layer.load_state_dict(
        {k: v for k, v in _layer().state_dict().items() if k in ("weight", "bias")}
    )
    (dx,) = grad(layer(x).pow(3).sum(), x, create_graph=True)
    (wanted,) = _one_by_one(dx, [x], _rows())
    found = torch.cat(three_ranks.run(_second_on_a_rank), dim=1)
    torch.testing.assert_close(found, wanted)
