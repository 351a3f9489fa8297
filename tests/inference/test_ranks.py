"""A test batch distributed over ranks is one batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.inference import example_weighted, prior_mix
from tests.calibration.networks import images
from tests.inference.rules import between, eval_network
from tests.ranks import RankError, Ranks

SHARES = {"equal": [6, 6, 6], "uneven": [1, 9, 3], "no data on one rank": [5, 0, 4]}


def _parts(shares: list[int], rank: int) -> Tensor:
    start = sum(shares[:rank])
    return images()[start : start + shares[rank]]


def _network() -> nn.Module:
    return syncbn.convert_sync_batchnorm(eval_network())


def _outputs(rank: int, shares: list[int]) -> tuple[Tensor, Tensor]:
    net, x = _network(), _parts(shares, rank).requires_grad_()
    with prior_mix(net, 4):
        y = net(x)
    (y.square() * torch.tensor([1.0, -3.0])).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("shares", SHARES)
def test_prior_mix_uses_batch_of_all_ranks(ranks: Ranks, shares: str) -> None:
    sizes = SHARES[shares][: ranks.size]
    results = ranks.run(_outputs, sizes)
    net, x = _network(), images()[: sum(sizes)].requires_grad_()
    with prior_mix(net, 4):
        y = net(x)
    (y.square() * torch.tensor([1.0, -3.0])).sum().backward()
    assert (torch.cat([y for y, _ in results]) - y).abs().max() < 1e-12
    assert x.grad is not None
    assert (torch.cat([dx for _, dx in results]) - x.grad).abs().max() < 1e-12


def _run_local_layer(rank: int) -> Tensor:
    torch.manual_seed(3)
    net, x = nn.BatchNorm2d(3).double().eval(), _parts([6, 6], rank)
    with prior_mix(net, 4):
        for _ in range(rank + 1):  # different numbers of forwards, without a collective
            y: Tensor = net(x)
    return y.detach()


def test_prior_mix_of_local_layer_uses_local_batch(two_ranks: Ranks) -> None:
    results = two_ranks.run(_run_local_layer)
    net = nn.BatchNorm2d(3).double().eval()
    with prior_mix(net, 4):
        for rank in range(2):
            assert (results[rank] - net(_parts([6, 6], rank))).abs().max() < 1e-12


def _run_example_weighted(rank: int) -> Tensor:
    net = _network()
    with example_weighted(net, 4, between(net)):
        for _ in range(rank + 1):
            y: Tensor = net(_parts([6, 6], rank))
    return y.detach()


def test_example_weighted_does_not_communicate(two_ranks: Ranks) -> None:
    results = two_ranks.run(_run_example_weighted)
    net = _network()
    with example_weighted(net, 4, between(net)):
        assert (torch.cat(results) - net(images()[:12])).abs().max() < 1e-12


def _run_different_layers(rank: int) -> None:
    net = _network()
    layer = net[1 + 5 * rank]  # type: ignore[index]
    with prior_mix(net, 4):
        layer(torch.zeros(2, layer.num_features, 3, 3).double())


def test_mismatched_layers_raise(two_ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"prior_mix in (1|6): the all-reduce of"):
        two_ranks.run(_run_different_layers)
