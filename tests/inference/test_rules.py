"""Inference rules, compared with independent computations, on one rank and over ranks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.inference import example_weighted, prior_mix
from tests.calibration.networks import images
from tests.inference.rules import RULES, between, eval_network, single
from tests.ranks import Ranks


def normalized(x: Tensor, layer: nn.BatchNorm2d, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Return x normalized with statistics ``[N or 1, C]``, by NumPy."""
    weight, bias = (p.detach().double().numpy()[:, None, None] for p in layer.parameters())
    invstd: np.ndarray = 1 / np.sqrt(var + layer.eps)
    hat = (x.double().numpy() - mean[..., None, None]) * invstd[..., None, None]
    return hat * weight + bias  # type: ignore[no-any-return]  # numpy's operators


def running(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    return layer.running_mean.double().numpy(), layer.running_var.double().numpy()


@pytest.mark.parametrize(("pseudo_samples", "offset"), [(0, 0.0), (0.5, 1e4), (16, 0.0)])
def test_prior_mix_matches_paper(pseudo_samples: float, offset: float) -> None:
    layer = single(3)
    x = torch.randn(5, 3, 4, 2, dtype=torch.float64) * 3 + offset
    mean, var = running(layer)
    share = 5 / (pseudo_samples + 5)
    mixed_mean = (1 - share) * mean + share * x.numpy().mean((0, 2, 3))
    mixed_var = (1 - share) * var + share * x.numpy().var((0, 2, 3))
    with prior_mix(layer, pseudo_samples):
        y = layer(x)
    expected = normalized(x, layer, mixed_mean[None], mixed_var[None])
    # Raw float64 sums lose 1e-16 (mean / std)^2 of the variance.
    bound = 1e-12 if offset == 0 else 1e-7 * abs(expected).max()
    assert abs(y.detach().numpy() - expected).max() < bound


def test_example_weighted_matches_formula() -> None:
    layer, batch_size, s2 = single(3), 4, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    x = torch.randn(5, 3, 4, 2, dtype=torch.float64) * 3
    mean, var = running(layer)
    own_mean, own_var = x.numpy().mean((2, 3)), x.numpy().var((2, 3))
    ours = own_mean / batch_size + (batch_size - 1) / batch_size * mean
    spread = (own_mean - mean) ** 2 - s2.numpy()
    theirs = own_var / batch_size + (batch_size - 1) / batch_size * var
    theirs += (batch_size - 1) / batch_size**2 * spread
    with example_weighted(layer, batch_size, {"": s2}):
        y = layer(x)
    assert abs(y.detach().numpy() - normalized(x, layer, ours, theirs)).max() < 1e-12


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_example_weighted_matches_expected_training_batch(batch_size: int) -> None:
    """Over all training batches that a sample can be in, drawn from a set of five."""
    samples = torch.randn(5, 2, 3, 3, dtype=torch.float64) * 2 + torch.randn(5, 2, 1, 1)
    layer: Any = single(2, eps=0.0)
    values = samples.transpose(0, 1).flatten(1)
    layer.running_mean.copy_(values.mean(1))
    layer.running_var.copy_(values.var(1, correction=0))
    s2 = samples.mean((2, 3)).var(0, correction=0)
    others = itertools.product(range(5), repeat=batch_size - 1)
    batches = [samples[[0, *other]].transpose(0, 1).flatten(1) for other in others]
    mean = torch.stack([batch.mean(1) for batch in batches]).mean(0)
    var = torch.stack([batch.var(1, correction=0) for batch in batches]).mean(0)
    with example_weighted(layer, batch_size, {"": s2}):
        y = layer(samples[:1])
    expected = normalized(samples[:1], layer, mean.numpy()[None], var.numpy()[None])
    assert abs(y.detach().numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_infinite_weight_of_the_running_statistics(rule: str) -> None:
    net, x = eval_network(), images(6)
    plain = net(x)
    for weight, bound in ((math.inf, 0.0), (1e12, 1e-9)):
        with RULES[rule][0](net, weight):
            error = (net(x) - plain).abs().max().item()
        assert error <= bound
        assert (error > 0) == (weight == 1e12)


def test_example_weighted_is_independent_of_batch() -> None:
    net, x = eval_network(), images(7)
    with example_weighted(net, 2, between(net)):
        together, apart = net(x), torch.cat([net(x[:1]), net(x[1:3]), net(x[3:3]), net(x[3:])])
    assert (together - apart).abs().max() < 1e-12


def test_example_weighted_accepts_report() -> None:
    net = eval_network()
    net.unused = nn.BatchNorm2d(3)
    report = syncbn.recalibrate(net[:-1], images().split(5))
    found = report.between()["1"]
    inputs = net[0](images()).mean((2, 3))
    assert (found - inputs.var(0, correction=1)).abs().max() < 1e-12
    plain = net[:-1](images(5))
    with example_weighted(net[:-1], 4, report):
        assert (net[:-1](images(5)) - plain).abs().max() > 1e-3


def test_unreached_layers_are_unchanged() -> None:
    net = nn.ModuleDict({"used": nn.BatchNorm2d(3), "not": nn.BatchNorm2d(3)}).double()
    report = syncbn.recalibrate(net, [images()], forward=lambda net, x: net["used"](x))  # type: ignore[index]
    with example_weighted(net, 4, report):
        assert type(net["not"]) is nn.BatchNorm2d
        assert type(net["used"]) is not nn.BatchNorm2d


def test_large_between_variance_is_finite() -> None:
    layer = single(3)
    with example_weighted(layer, 2, {"": torch.full((3,), 1e6)}):
        assert layer(images(3)).isfinite().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", ["as the input", "float32"])
def test_dtypes_and_memory_formats(rule: str, dtype: torch.dtype, parameters: str) -> None:
    x = images(6).contiguous(memory_format=torch.channels_last)
    exact = single(3)
    layer = single(3, torch.float32 if parameters == "float32" else dtype)
    layer.load_state_dict(exact.state_dict())
    exact.load_state_dict(layer.state_dict())  # the rounded values
    with RULES[rule][0](layer), RULES[rule][0](exact):
        y, expected = layer(x.to(dtype)), exact(x.to(dtype).double())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 2, 3, 2), (1, 3, 70, 70)], ids=str)
def test_input_dimensions(rule: str, shape: tuple[int, ...]) -> None:
    layer = syncbn.SyncBatchNorm(3).double().eval()
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    flat = x.reshape(*shape[:2], -1, 1)
    two_d = nn.BatchNorm2d(3).double().eval()
    with RULES[rule][0](layer), RULES[rule][0](two_d):
        assert (layer(x) - two_d(flat).reshape(shape)).abs().max() < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_empty_batch(rule: str) -> None:
    net = eval_network()
    with RULES[rule][0](net):
        assert net(images(0)).shape == (0, 2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (3, 2)], ids=str)
def test_gradients(rule: str, shape: tuple[int, ...]) -> None:
    layer = syncbn.SyncBatchNorm(2).double().eval()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with RULES[rule][0](layer):
        assert torch.autograd.gradcheck(layer, x)
        assert torch.autograd.gradgradcheck(layer, x)


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
    net: Any = _network()
    layer = (net[1], net[3].first[1])[rank]  # of as many channels, or Gloo ends the process
    with prior_mix(net, 4), pytest.raises(RuntimeError) as caught:
        layer(torch.zeros(2, layer.num_features, 3, 3).double())
    return str(caught.value)


def test_mismatched_layers_raise(two_ranks: Ranks) -> None:
    for rank, message in enumerate(two_ranks.run(_run_different_layers)):
        assert f"prior_mix in {('1', '3.first.1')[rank]}: " in message
