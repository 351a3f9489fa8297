"""Masked inputs against the same values without padding, in one process."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import syncbn
from tests.device import on_cpu, seeded
from tests.kernel_cases import tolerance
from tests.ranks import Ranks

pytestmark = pytest.mark.layers

C = 3


def _inputs(rank: int, offset: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return x, dy, residual and mask of a rank; padding is NaN. Rank 1 has only padding."""
    torch.manual_seed(rank)
    x, dy, residual = (torch.randn(3 + rank, C, 5, 2) for _ in range(3))
    mask = (torch.rand(3 + rank, 5, 2) < 0.6) & (rank != 1)
    x = (x + offset).to(dtype)
    return x.where(mask.unsqueeze(1), torch.nan), dy.to(dtype), residual.to(dtype), mask


def _select(t: Tensor, mask: Tensor) -> Tensor:
    """Return the unmasked values, ``[M, C]``."""
    return t.movedim(1, -1)[mask]


#: Offset, dtype, and True for a residual and an activation.
CASES = list(product((0.0, 1e3), (torch.float32, torch.bfloat16), (False, True)))


def _run_cases(rank: int) -> list[tuple[list[Any], ...]]:
    """Return y, dx and dresidual; parameter gradients; running statistics of every case."""
    results: list[tuple[list[Any], ...]] = []
    for offset, dtype, fused in CASES:
        x, dy, residual, mask = _inputs(rank, offset, dtype)
        x.requires_grad_()
        layer = syncbn.SyncBatchNorm2d(C, activation="silu" if fused else None, momentum=0.5)
        y = layer(x, residual.requires_grad_() if fused else None, mask)
        y.backward(dy)
        tensors: list[Any] = [y.detach(), x.grad, *([residual.grad] if fused else [])]
        assert all(bool((t.movedim(1, -1)[~mask] == 0).all()) for t in tensors)
        selected = [_select(t, mask) for t in tensors]
        results.append((selected, [p.grad for p in layer.parameters()], list(layer.buffers())))
    return results


def _expect(ranks: int, offset: float, dtype: torch.dtype, fused: bool) -> tuple[list[Any], ...]:
    parts = [_inputs(rank, offset, dtype) for rank in range(ranks)]
    x, dy, residual = (
        torch.cat([_select(part[i], part[3]) for part in parts]).double().requires_grad_()
        for i in range(3)
    )
    weight, bias = torch.ones(C, requires_grad=True), torch.zeros(C, requires_grad=True)
    mean, var = torch.zeros(C).double(), torch.ones(C).double()
    y = F.batch_norm(x, mean, var, weight.double(), bias.double(), True, 0.5)
    y = F.silu(y + residual) if fused else y
    y.backward(dy)
    tensors = [y.detach(), x.grad, *([residual.grad] if fused else [])]
    return tensors, [weight.grad, bias.grad], [mean, var]


def test_masked_values_are_ignored(three_ranks: Ranks) -> None:
    answers = three_ranks.run(_run_cases)
    for case, results in zip(CASES, zip(*answers, strict=True), strict=True):
        tensors, gradients, buffers = _expect(3, *case)
        selected, shares, statistics = zip(*results, strict=True)
        bound = 10 * tolerance(case[1])
        actual = [torch.cat(parts).double() for parts in zip(*selected, strict=True)]
        torch.testing.assert_close(actual, tensors, rtol=bound, atol=bound)
        actual = [torch.stack(parts).sum(0) for parts in zip(*shares, strict=True)]
        torch.testing.assert_close(actual, gradients, rtol=3 * bound, atol=3 * bound)
        for mean, var, counter in statistics:
            actual = [mean.double(), var.double()]
            torch.testing.assert_close(actual, buffers, rtol=1e-6, atol=1e-6)
            assert counter == 1


def _all_padding(rank: int) -> list[Tensor]:
    layer = syncbn.SyncBatchNorm1d(C)
    x = torch.full((2, C, 4), torch.nan, requires_grad=True)
    layer(x, mask=torch.zeros(2, 4, dtype=torch.bool)).sum().backward()
    assert x.grad is not None
    return [x.grad, *layer.buffers()]


def test_padding_alone_leaves_running_statistics_unchanged(two_ranks: Ranks) -> None:
    for dx, *buffers in two_ranks.run(_all_padding):
        expected = [torch.zeros_like(dx), torch.zeros(C), torch.ones(C), torch.tensor(0)]
        torch.testing.assert_close([dx, *buffers], expected)


@pytest.mark.parametrize(
    "shape", [(4, 6), (4, 1, 6), (4, 1), (1, 6), (4, 1, 1), (1, 1, 1)], ids=str
)
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    x, mask = torch.randn(4, C, 6), torch.ones(shape, dtype=torch.bool)
    mask.view(-1)[::3] = shape == (1, 1, 1)
    whole = (mask if mask.ndim == 3 else mask.unsqueeze(1)).expand(4, 1, 6)
    for training in (True, False):
        layer, same = (syncbn.SyncBatchNorm1d(C).train(training) for _ in range(2))
        expected = same(x, mask=whole)
        assert torch.equal(layer(x, mask=mask), expected)
        y = syncbn.sync_batch_norm(x, torch.zeros(C), torch.ones(C), training=training, mask=mask)
        torch.testing.assert_close(y, expected)
        assert (y.masked_select(~whole) == 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_invalid_masks_raise(training: bool) -> None:
    layer, valid = syncbn.SyncBatchNorm1d(C).train(training), torch.ones(4, 6, dtype=torch.bool)
    wide = valid.unsqueeze(1).expand(4, C, 6)
    for mask in (valid.float(), wide, valid[:3], valid[0], valid.to("meta")):
        with pytest.raises(ValueError, match=r"got a mask of shape .*expected torch.bool there"):
            layer(torch.randn(4, C, 6), mask=mask)
    assert layer.num_batches_tracked == 0


def test_masked_nan_has_no_effect_in_evaluation() -> None:
    layer, generator = syncbn.SyncBatchNorm2d(3).eval(), seeded(0)
    mask = torch.rand(2, 4, 4, generator=generator) > 0.5
    x = torch.randn(2, 3, 4, 4, generator=generator).masked_fill(~mask[:, None], float("nan"))
    x.requires_grad_()
    layer(x, mask=mask).square().sum().backward()
    for gradient in (x.grad, layer.weight.grad, layer.bias.grad):
        assert gradient is not None
        assert gradient.isfinite().all()


def _one_value(rank: int, mask: Tensor) -> None:
    x = torch.randn(len(mask), 3, mask.shape[1])
    with pytest.raises(ValueError, match="a single value per channel"):
        syncbn.SyncBatchNorm1d(3)(x, mask=mask)


def _one_value_of_all(rank: int) -> None:
    _one_value(rank, torch.full(((1, 1), (4, 5))[rank], rank == 0))


@on_cpu
def test_one_unmasked_value_is_an_error_on_every_rank(two_ranks: Ranks) -> None:
    """A rank with more values, all masked, went on, and waited in its backward pass."""
    two_ranks.run(_one_value_of_all)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 2] = True
    _one_value(0, mask)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_few_unmasked_values_keep_their_precision(kernel: str) -> None:
    """Regression: the sums of the fill value cancelled the variance of the few values."""
    generator = seeded(0)
    x = torch.randn(2, 3, 128, 128, generator=generator) + 1e4
    mask = torch.zeros(2, 128, 128, dtype=torch.bool)
    mask.view(-1)[torch.randperm(mask.numel(), generator=generator)[:7]] = True
    layer = syncbn.SyncBatchNorm2d(3, momentum=1.0)
    layer.impl = kernel
    y = _select(layer(x, mask=mask), mask)
    values = _select(x, mask).double()
    var, mean = torch.var_mean(values, 0, correction=0)
    expected = (values - mean) / (var + layer.eps).sqrt()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6)
    running_var = layer.get_buffer("running_var").double()
    torch.testing.assert_close(running_var, values.var(0), rtol=1e-6, atol=0)
