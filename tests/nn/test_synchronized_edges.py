"""The layer on ranks that have next to nothing to normalize: no values, one, or all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import syncbn
from tests.device import on_cpu
from tests.ranks import Ranks

pytestmark = pytest.mark.layers


def _all_empty(rank: int, momentum: float | None) -> dict[str, Any]:
    layer = syncbn.SyncBatchNorm2d(3, momentum=momentum)
    layer(torch.randn(4, 3, 2, 2))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.empty(0, 3, 2, 2, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    after = layer.state_dict()
    return {
        "same": all(torch.equal(before[name], after[name]) for name in before),
        "shapes": (tuple(y.shape), None if x.grad is None else tuple(x.grad.shape)),
        "gradient": layer.weight.grad,
    }


@pytest.mark.parametrize("momentum", [0.1, None])
def test_every_rank_empty_leaves_the_buffers_alone(two_ranks: Ranks, momentum: float) -> None:
    for answer in two_ranks.run(_all_empty, momentum):
        assert answer["same"]
        assert answer["shapes"] == ((0, 3, 2, 2), (0, 3, 2, 2))
        assert torch.equal(answer["gradient"], torch.zeros(3))


def _constant(rank: int, value: float) -> torch.Tensor:
    layer = syncbn.SyncBatchNorm2d(2, momentum=1.0)
    layer(torch.full((3 + rank, 2, 7, 5), value))
    return layer.get_buffer("running_var")


@pytest.mark.parametrize("value", [0.1, 1e3 + 0.1, 1e4 + 0.1, 1e5 + 0.3, 1e6 + 0.3])
def test_a_constant_channel_has_no_variance(ranks: Ranks, value: float) -> None:
    for variance in ranks.run(_constant, value):
        assert torch.equal(variance, torch.zeros(2))


def _one_value(rank: int) -> str:
    layer = syncbn.SyncBatchNorm2d(3)
    try:
        layer(torch.ones(1 if rank == 1 else 0, 3, 1, 1))
    except ValueError as error:
        assert torch.equal(layer.get_buffer("running_var"), torch.ones(3))
        assert layer.num_batches_tracked == 0
        return str(error)
    return "no error"


@on_cpu
def test_one_value_in_the_group_is_an_error_on_every_rank(ranks: Ranks) -> None:
    for message in ranks.run(_one_value):
        assert "single value per channel in the whole group" in message


def _one_value_each(rank: int) -> bool:
    y = syncbn.SyncBatchNorm2d(3)(torch.full((1, 3, 1, 1), float(rank)))
    return bool(y.isfinite().all())


def test_one_value_a_rank_is_enough(ranks: Ranks) -> None:
    assert all(ranks.run(_one_value_each))
