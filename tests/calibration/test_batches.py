"""Supported batches: any type, size and number."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import syncbn
from tests.calibration.networks import (
    EXACT,
    compute_population_stats,
    distance,
    images,
    network,
    statistics,
)


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
