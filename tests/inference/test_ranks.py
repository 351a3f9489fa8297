"""A test batch distributed over ranks is one batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.inference import example_weighted, prior_mix
from tests.calibration.networks import images
from tests.inference.rules import between, eval_network
from tests.ranks import Ranks


def _parts(shares: list[int], rank: int) -> Tensor:
    start = sum(shares[:rank])
    return images()[start : start + shares[rank]]


def _network() -> nn.Module:
    return syncbn.convert_sync_batchnorm(eval_network())


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    net = _network()
    x.requires_grad_()
    with prior_mix(net, 4):
        y = net(x)
    (y.square() * torch.tensor([1.0, -3.0])).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def _outputs_of_rank(rank: int, shares: list[int]) -> tuple[Tensor, Tensor]:
    return _outputs(_parts(shares, rank))


@pytest.mark.parametrize("shares", [[6, 6, 6], [1, 9, 3], [5, 0, 4]], ids=str)
def test_prior_mix_uses_batch_of_all_ranks(three_ranks: Ranks, shares: list[int]) -> None:
    results = zip(*three_ranks.run(_outputs_of_rank, shares), strict=True)
    for parts, expected in zip(results, _outputs(images()[: sum(shares)]), strict=True):
        assert (torch.cat(parts) - expected).abs().max() < 1e-12


def _run_local_layer(rank: int) -> Tensor:
    torch.manual_seed(3)
    net, x = nn.BatchNorm2d(3).double().eval(), _parts([6, 6], rank)
    with prior_mix(net, 4):
        for _ in range(rank + 1):  # different numbers of forwards, without a collective
            y: Tensor = net(x)
    return y.detach()


def test_prior_mix_of_local_layer_uses_local_batch(two_ranks: Ranks) -> None:
    net = nn.BatchNorm2d(3).double().eval()
    with prior_mix(net, 4):
        for rank, y in enumerate(two_ranks.run(_run_local_layer)):
            assert (y - net(_parts([6, 6], rank))).abs().max() < 1e-12


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


def _run_different_layers(rank: int) -> str:
    net = _network()
    layer = net[1 + 5 * rank]  # type: ignore[index]
    with prior_mix(net, 4), pytest.raises(RuntimeError) as caught:
        layer(torch.zeros(2, layer.num_features, 3, 3).double())
    return str(caught.value)


def test_mismatched_layers_raise(two_ranks: Ranks) -> None:
    for rank, message in enumerate(two_ranks.run(_run_different_layers)):
        assert f"prior_mix in {1 + 5 * rank}: the all-reduce of" in message
