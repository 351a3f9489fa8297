"""Training-mode forwards that must not count."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.device import seeded
from tests.ranks import Ranks

pytestmark = pytest.mark.layers


def _input(rank: int) -> Tensor:
    generator = seeded(rank)
    return torch.randn(2 + rank, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()


def _forward(rank: int, frozen: bool) -> tuple[Tensor, Any, dict[str, Any]]:
    net = nn.Sequential(syncbn.SyncBatchNorm1d(3, activation="relu"), syncbn.SyncBatchNorm1d(3))
    net.double()(_input(7))
    x, before = _input(rank), copy.deepcopy(net.state_dict())
    if frozen:
        with syncbn.frozen_statistics(net):
            y = net(x)
        torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)
    else:
        y = net(x)
        assert net.get_buffer("0.num_batches_tracked") == 2
    y.square().sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in net.named_parameters()}


def test_outputs_and_gradients_are_unchanged(two_ranks: Ranks) -> None:
    for frozen, plain in zip(
        two_ranks.run(_forward, True), two_ranks.run(_forward, False), strict=True
    ):
        torch.testing.assert_close(frozen, plain, rtol=0, atol=0)


def _fail_in_body(layer: nn.Module) -> None:
    with syncbn.frozen_statistics(layer), syncbn.frozen_statistics(layer):
        layer(torch.full((2, 3), torch.nan))
        raise KeyError


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, syncbn.SyncBatchNorm1d])
@pytest.mark.parametrize("track", [True, False])
def test_settings_are_restored_also_after_an_error(kind: type[nn.BatchNorm1d], track: bool) -> None:
    layer = kind(3, track_running_stats=track)
    with pytest.raises(KeyError):
        _fail_in_body(layer)
    assert layer.track_running_stats is track
    if track:
        assert layer.num_batches_tracked == 0
        assert layer.running_var is not None
        assert layer.running_var.eq(1).all()
        layer(torch.randn(2, 3))
        assert layer.num_batches_tracked == 1


def test_evaluation_uses_the_running_statistics() -> None:
    layer = syncbn.SyncBatchNorm1d(3)
    layer(torch.randn(5, 3))
    layer.eval()
    x = torch.randn(2, 3)
    with syncbn.frozen_statistics(layer):
        frozen = layer(x)
    assert torch.equal(frozen, layer(x))


def test_micro_batches_in_the_body_do_not_accumulate() -> None:
    layer, expected = syncbn.SyncBatchNorm1d(3), syncbn.SyncBatchNorm1d(3)
    x = torch.randn(5, 3)
    with syncbn.accumulate_statistics(layer):
        layer(x)
        with syncbn.frozen_statistics(layer):
            layer(torch.randn(4, 3))
    expected(x)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(expected.named_buffers()))


def test_a_model_without_layers_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="got Linear without a batch-norm layer"),
        syncbn.frozen_statistics(nn.Linear(2, 2)),
    ):
        pass
