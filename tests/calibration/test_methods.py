"""Each method, and each type of batches, against independent statistics of the whole data."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import syncbn
from tests.calibration.networks import (
    EXACT,
    Model,
    compute_population_stats,
    distance,
    images,
    layers,
    network,
    require_error,
    run_batch,
    statistics,
)

BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize(
    ("forward", "dtype"), [(None, torch.float64), (None, torch.float32), (run_batch, torch.float64)]
)
@pytest.mark.parametrize("batch_size", [1, 5, 16, 24])
@pytest.mark.parametrize("method", EXACT)
def test_independent_of_batch_size(
    method: Any, batch_size: int, dtype: torch.dtype, forward: Any
) -> None:
    x, net = images(dtype=dtype), network(dtype)
    expected = compute_population_stats(network(dtype), x)
    assert distance(statistics(net), expected) > 0.1
    report = syncbn.recalibrate(net, x.split(batch_size), method=method, forward=forward)
    assert distance(statistics(net), expected) < BOUND[dtype]
    assert [layer.samples for layer in report.layers] == [24] * 5
    assert [layer.count for layer in report.layers] == [24 * 64] * 3 + [24 * 9, 24]


def test_mixed_batch_and_image_sizes() -> None:
    # Only some of these small inputs can be coalesced.
    parts = [images(5), images(1), images(4)[:, :, :6, :5], images(3)[:, :, ::2, ::2], images(2)]
    results = []
    for method in EXACT:
        net = network()
        report = syncbn.recalibrate(net, parts, method=method)
        results.append(statistics(net))
        assert report.layers[0].samples == 15
    assert distance(*results) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).to(dtype)
    x = images(16, dtype)
    syncbn.recalibrate(net, x.split(3))
    values = x.double().transpose(0, 1).flatten(1)
    expected = values.mean(1), values.var(1)
    torch.testing.assert_close(statistics(net)["0"], expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pixels", [1, 8, 70])
@pytest.mark.parametrize("mean_over_std", [0, 20, 1e2, 1e4])
@pytest.mark.parametrize("method", EXACT)
def test_large_mean(method: Any, mean_over_std: float, pixels: int, layout: Any) -> None:
    """Float32 data with float64 buffers, which show more digits."""
    net = nn.Sequential(nn.BatchNorm2d(2)).double()
    x = (torch.randn(30, 2, pixels, pixels) + mean_over_std).to(memory_format=layout)
    with torch.no_grad():
        syncbn.recalibrate(net, x.split(7), method=method, forward=_run_hooks_only)
    values = x.double().transpose(0, 1).flatten(1)
    mean, var = statistics(net)["0"]
    assert ((mean - values.mean(1)).abs() / values.std(1)).max() < 1e-6
    torch.testing.assert_close(var, values.var(1), rtol=1e-6, atol=0)


def _run_hooks_only(model: Any, x: Tensor) -> object:
    for hook in model[0]._forward_pre_hooks.values():
        hook(model[0], (x,), {})  # float64 layers do not support float32 inputs
    return None


def test_thread_local_state_is_separate() -> None:
    """Autocast and grad mode of a suspended forward do not affect another."""

    def run(net: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net.norm(net.body(x))
        assert not torch.is_autocast_enabled("cpu")
        with torch.enable_grad():
            z = net.last(net.head(y.float()))
        assert not torch.is_grad_enabled()
        return z

    x = torch.randn(12, 4)
    results = []
    for method in EXACT:
        torch.manual_seed(3)
        modules = {"body": nn.Linear(4, 4), "head": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)}
        net = Model(run, **modules, last=nn.BatchNorm1d(4))
        syncbn.recalibrate(net, x.split(3), method=method, forward=run_batch)
        results.append(statistics(net))
    assert distance(*results) < 1e-6
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


#: For methods that normalize each batch with the batch's statistics.
BATCHES = [images(24)[:3], images(24)[3:10], images(24)[10:12], images(24)[12:]]


def _collect_training_inputs(batches: list[Tensor]) -> dict[str, list[Any]]:
    """Return the inputs of every layer, ``[C, n]``, with each batch normalized as in training."""
    net = network().eval()
    seen: dict[str, list[Any]] = {name: [] for name in layers(net)}
    for name, layer in layers(net).items():

        def keep(module: Any, args: tuple[Tensor], name: str = name) -> None:
            values = args[0].transpose(0, 1).flatten(1)
            module.running_mean.copy_(values.mean(1))
            module.running_var.copy_(values.var(1, correction=0))
            seen[name].append(values.numpy())

        layer.register_forward_pre_hook(keep)
    with torch.no_grad():
        for batch in batches:
            net(batch)
    return seen


@pytest.mark.parametrize("batches", [BATCHES, list(images(4).split(1))], ids=["pairs", "single"])
def test_pooled_matches_statistics_of_all_inputs(batches: list[Tensor]) -> None:
    """A batch of one value per channel is accepted."""
    net = network()
    report = syncbn.recalibrate(net, batches, method="pooled")
    for name, values in _collect_training_inputs(batches).items():
        mean, var = statistics(net)[name]
        joined = np.concatenate(values, axis=1)
        np.testing.assert_allclose(mean.numpy(), joined.mean(1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(var.numpy(), joined.var(1, ddof=1), rtol=1e-9)
    assert [layer.samples for layer in report.layers] == [sum(map(len, batches))] * 5


def test_average_matches_ioffe_and_szegedy() -> None:
    net = network()
    syncbn.recalibrate(net, BATCHES, method="average")
    for name, values in _collect_training_inputs(BATCHES).items():
        mean, var = statistics(net)[name]
        means = np.mean([x.mean(1) for x in values], axis=0)
        corrected = [x.shape[1] / (x.shape[1] - 1) * x.var(1) for x in values]
        np.testing.assert_allclose(mean.numpy(), means, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(var.numpy(), np.mean(corrected, axis=0), rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_ema_matches_training(momentum: float | None) -> None:
    ours, torchs = network(), network()
    for net in (ours, torchs):
        net[6] = nn.BatchNorm2d(5).double()
        for layer in layers(net).values():
            layer.momentum = momentum
    syncbn.recalibrate(ours, BATCHES, method="ema")
    for layer in layers(torchs).values():
        layer.train()
        layer.num_batches_tracked.zero_()
    torchs[4].eval()
    with torch.no_grad():
        for batch in BATCHES:
            torchs(batch)
    assert distance(statistics(ours), statistics(torchs)) < 1e-12


@pytest.mark.parametrize("method", ["average", "ema"])
def test_single_value_batch_raises(method: str) -> None:
    message = "11: got a batch with one value per channel.*lockstep"
    require_error(network(), message, images(4).split(1), method=method)


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from images()


X, LABELS = images(), torch.zeros(24)
PAIRS = TensorDataset(X, LABELS)
FEEDS: dict[str, Any] = {
    "tensors": X.split(5),
    "an iterator": iter(X.split(5)),
    "lists": [[x, "a name"] for x in X.split(5)],
    "named tuples": [Pair(x, y) for x, y in zip(X.split(5), LABELS.split(5), strict=True)],
    "keywords": [{"input": x} for x in X.split(5)],
    "keywords of transformers": [UserDict(input=x) for x in X.split(5)],
    "a loader": DataLoader(PAIRS, batch_size=5),
    "a shuffling loader": DataLoader(PAIRS, batch_size=5, shuffle=True),
    "a stream": DataLoader(Stream(), batch_size=5),
}


@pytest.mark.parametrize("feed", FEEDS)
def test_batch_types(feed: str) -> None:
    net = network()
    syncbn.recalibrate(net, FEEDS[feed])
    assert distance(statistics(net), compute_population_stats(network(), X)) < 1e-12


@pytest.mark.parametrize(
    ("number", "size", "together"),
    # 32 samples of 8x8; two of 64x64 and float64, 96 KiB each, stay below 256 KiB.
    [(70, 8, [32, 32, 6]), (5, 64, [2, 2, 1]), (2, 128, [1, 1])],
)
def test_lockstep_coalesces_small_batches(number: int, size: int, together: list[int]) -> None:
    net, seen = network(), []
    x = torch.randn(number, 3, size, size, dtype=torch.float64)
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    syncbn.recalibrate(net, x.split(1))
    verified = [1, 1]
    assert seen == [1, *together, *verified]  # the first sample is profiled


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("batch_size", [3, 10, 24])
def test_num_samples(method: Any, batch_size: int) -> None:
    net, batches = network(), [{"input": x} for x in X.split(batch_size)]
    report = syncbn.recalibrate(net, batches, method=method, num_samples=11)
    assert distance(statistics(net), compute_population_stats(network(), X[:11])) < 1e-12
    assert report.layers[0].samples == 11


@pytest.mark.parametrize("own_generator", [False, True])
def test_sequential_repeats_shuffled_batches(own_generator: bool) -> None:
    """Another subset of a shuffling loader would change the statistics."""

    def loader() -> DataLoader[Any]:
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(5) if own_generator else None
        return DataLoader(PAIRS, batch_size=5, shuffle=True, generator=generator)

    net, (first, second, *_) = network(), [x for x, _ in loader()]
    syncbn.recalibrate(net, loader(), method="sequential", num_samples=10)
    expected = compute_population_stats(network(), first, second)
    assert distance(statistics(net), expected) < 1e-12
