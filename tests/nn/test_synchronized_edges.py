"""The layer on ranks without values, with one value, and with equal values."""

from __future__ import annotations

import pytest
import torch

import syncbn
from tests.device import on_cpu
from tests.ranks import Ranks

pytestmark = pytest.mark.layers


def _all_empty(rank: int) -> None:
    for momentum in (0.1, None):
        layer = syncbn.SyncBatchNorm2d(3, momentum=momentum)
        layer(torch.randn(4, 3, 2, 2))
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        x = torch.empty(0, 3, 2, 2, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert x.grad is not None
        assert y.shape == x.grad.shape == x.shape
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
        torch.testing.assert_close(layer.weight.grad, torch.zeros(3), rtol=0, atol=0)


def test_every_rank_empty_leaves_the_buffers_unchanged(two_ranks: Ranks) -> None:
    two_ranks.run(_all_empty)


def _constant(rank: int) -> list[torch.Tensor]:
    variances = []
    for value in (0.1, 1e3 + 0.1, 1e4 + 0.1, 1e5 + 0.3, 1e6 + 0.3):
        layer = syncbn.SyncBatchNorm2d(2, momentum=1.0)
        layer(torch.full((3 + rank, 2, 7, 5), value))
        variances.append(layer.get_buffer("running_var"))
    return variances


def test_a_constant_channel_has_no_variance(ranks: Ranks) -> None:
    for variances in ranks.run(_constant):
        assert not torch.stack(variances).any()


def _one_value(rank: int) -> None:
    layer = syncbn.SyncBatchNorm2d(3)
    with pytest.raises(ValueError, match="single value per channel in the whole group"):
        layer(torch.ones(1 if rank == 1 else 0, 3, 1, 1))
    assert torch.equal(layer.get_buffer("running_var"), torch.ones(3))
    assert layer.num_batches_tracked == 0


@on_cpu
def test_one_value_in_the_group_is_an_error_on_every_rank(three_ranks: Ranks) -> None:
    three_ranks.run(_one_value)


def _one_value_each(rank: int) -> bool:
    y = syncbn.SyncBatchNorm2d(3)(torch.full((1, 3, 1, 1), float(rank)))
    return bool(y.isfinite().all())


def test_one_value_per_rank_is_enough(two_ranks: Ranks) -> None:
    assert two_ranks.run(_one_value_each) == [True, True]
