"""Masked inputs against the same values without padding, in one process."""

from __future__ import annotations

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
    """Return x, dy, residual and mask of a rank; padding is NaN. Rank 1 has nothing else."""
    torch.manual_seed(rank)
    x, dy, residual = (torch.randn(3 + rank, C, 5, 2) for _ in range(3))
    mask = (torch.rand(3 + rank, 5, 2) < 0.6) & (rank != 1)
    x = (x + offset).to(dtype)
    return x.where(mask.unsqueeze(1), torch.nan), dy.to(dtype), residual.to(dtype), mask


def _values(t: Tensor, mask: Tensor) -> Tensor:
    """Return the unmasked values, ``[M, C]``."""
    return t.movedim(1, -1)[mask]


def _observe(rank: int, offset: float, dtype: torch.dtype, options: dict[str, Any]) -> list[Any]:
    x, dy, *rest, mask = _inputs(rank, offset, dtype)
    x.requires_grad_()
    residual = rest[0].requires_grad_() if options["residual"] else None
    layer = syncbn.SyncBatchNorm2d(C, activation=options["activation"], momentum=0.5)
    y = layer(x, residual, mask)
    y.backward(dy)
    tensors: list[Any] = [y, x.grad, *([] if residual is None else [residual.grad])]
    assert all(bool((t.movedim(1, -1)[~mask] == 0).all()) for t in tensors)
    numbers = [p.grad for p in layer.parameters()] + list(layer.buffers())
    return [*(_values(t.detach(), mask) for t in tensors), *numbers]


def _expected(
    ranks: int, offset: float, dtype: torch.dtype, options: dict[str, Any]
) -> list[list[Any]]:
    parts = [_inputs(rank, offset, dtype) for rank in range(ranks)]
    x, dy, residual = (
        torch.cat([_values(part[i], part[3]) for part in parts]).double().requires_grad_()
        for i in range(3)
    )
    weight, bias = torch.ones(C, requires_grad=True), torch.zeros(C, requires_grad=True)
    mean, var = torch.zeros(C).double(), torch.ones(C).double()
    y = F.batch_norm(x, mean, var, weight.double(), bias.double(), True, 0.5)
    y = y + residual if options["residual"] else y
    y = y.relu() if options["activation"] else y
    y.backward(dy)
    tensors = [y.detach(), x.grad, *([residual.grad] if options["residual"] else [])]
    sizes = [int(part[3].sum()) for part in parts]
    split = [t.split(sizes) for t in tensors if t is not None]
    return [[*(t[rank] for t in split), weight.grad, bias.grad, mean, var] for rank in range(ranks)]


OPTIONS = [
    {"activation": None, "residual": False},
    {"activation": "relu", "residual": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_masked_values_are_ignored(
    ranks: Ranks, offset: float, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    wanted = _expected(ranks.size, offset, dtype, options)
    found = ranks.run(_observe, offset, dtype, options)
    tensors = 3 if options["residual"] else 2
    for mine, theirs in zip(found, wanted, strict=True):
        for a, b in zip(mine[:tensors], theirs[:tensors], strict=True):
            near = 10 * tolerance(dtype)
            torch.testing.assert_close(a.double(), b, rtol=near, atol=near)
        torch.testing.assert_close(
            [t.double() for t in mine[-3:-1]], theirs[-2:], rtol=1e-6, atol=1e-6
        )
        assert mine[-1] == 1
    for number in (0, 1):
        total = sum(of_rank[tensors + number] for of_rank in found)
        near = 30 * tolerance(dtype)
        torch.testing.assert_close(total, wanted[0][tensors + number], rtol=near, atol=near)


def _nothing(rank: int) -> list[Tensor]:
    layer = syncbn.SyncBatchNorm1d(C)
    x = torch.full((2, C, 4), torch.nan, requires_grad=True)
    layer(x, mask=torch.zeros(2, 4, dtype=torch.bool)).sum().backward()
    assert x.grad is not None
    return [x.grad, *layer.buffers()]


def test_nothing_that_counts_leaves_the_averages_alone(two_ranks: Ranks) -> None:
    for dx, mean, var, tracked in two_ranks.run(_nothing):
        wanted = torch.zeros_like(dx), torch.zeros(C), torch.ones(C), torch.tensor(0)
        torch.testing.assert_close((dx, mean, var, tracked), wanted)


@pytest.mark.parametrize(
    "shape", [(4, 6), (4, 1, 6), (4, 1), (1, 6), (4, 1, 1), (1, 1, 1)], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_masks_broadcast(shape: tuple[int, ...], training: bool) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(4, C, 6), torch.ones(shape, dtype=torch.bool)
    mask.view(-1)[::3] = shape == (1, 1, 1)
    whole = (mask if mask.ndim == 3 else mask.unsqueeze(1)).expand(4, 1, 6)
    layer, same = syncbn.SyncBatchNorm1d(C).train(training), syncbn.SyncBatchNorm1d(C)
    same.train(training)
    assert torch.equal(layer(x, mask=mask), same(x, mask=whole))
    functional = syncbn.sync_batch_norm(
        x, torch.zeros(C), torch.ones(C), training=training, mask=mask
    )
    torch.testing.assert_close(functional, same(x, mask=whole))
    assert (functional.masked_select(~whole) == 0).all()


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4, 6),
        torch.ones(4, C, 6, dtype=torch.bool),
        torch.ones(3, 6, dtype=torch.bool),
        torch.ones(6, dtype=torch.bool),
        torch.ones(4, 6, dtype=torch.bool, device="meta"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_other_masks_are_errors(mask: Tensor, training: bool) -> None:
    layer = syncbn.SyncBatchNorm1d(C).train(training)
    with pytest.raises(ValueError, match=r"got a mask of shape .*expected torch.bool there"):
        layer(torch.randn(4, C, 6), mask=mask)
    assert layer.num_batches_tracked == 0


def test_nan_that_does_not_count_has_no_effect_in_evaluation() -> None:
    layer, generator = syncbn.SyncBatchNorm2d(3).eval(), seeded(0)
    mask = torch.rand(2, 4, 4, generator=generator) > 0.5
    x = torch.randn(2, 3, 4, 4, generator=generator).masked_fill(~mask[:, None], float("nan"))
    x.requires_grad_()
    layer(x, mask=mask).square().sum().backward()
    for gradient in (x.grad, layer.weight.grad, layer.bias.grad):
        assert gradient is not None
        assert gradient.isfinite().all()


def _one_value(rank: int) -> str:
    layer = syncbn.SyncBatchNorm1d(3)
    x = torch.randn([1, 4][rank], 3, [1, 5][rank])
    mask = torch.full((len(x), x.shape[2]), rank == 0)
    with pytest.raises(ValueError, match="a single value per channel") as caught:
        layer(x, mask=mask)
    return str(caught.value)


@on_cpu
def test_one_value_that_counts_is_an_error_on_every_rank(two_ranks: Ranks) -> None:
    """A rank with more values, none of which counts, went on, and waited in its backward pass."""
    assert len(two_ranks.run(_one_value)) == 2


@on_cpu
def test_one_value_that_counts_alone() -> None:
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 2] = True
    with pytest.raises(ValueError, match="a single value per channel"):
        syncbn.SyncBatchNorm1d(3)(torch.randn(2, 3, 4), mask=mask)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_few_values_of_many_are_as_exact(kernel: str) -> None:
    """Regression: the sums of the fill value cancelled the variance of the few values."""
    generator = seeded(0)
    x = torch.randn(2, 3, 128, 128, generator=generator) + 1e4
    mask = torch.zeros(2, 128, 128, dtype=torch.bool)
    mask.view(-1)[torch.randperm(mask.numel(), generator=generator)[:7]] = True
    layer = syncbn.SyncBatchNorm2d(3, momentum=1.0)
    layer.impl = kernel
    y = layer(x, mask=mask).movedim(1, -1)[mask]
    values = x.movedim(1, -1)[mask].double()
    var, mean = torch.var_mean(values, 0, correction=0)
    wanted = (values - mean) / (var + layer.eps).sqrt()
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=1e-6)
    found = layer.get_buffer("running_var").double()
    torch.testing.assert_close(found, values.var(0), rtol=1e-6, atol=0)
