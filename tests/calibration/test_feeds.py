"""What batches may be: of any make, size and number."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import syncbn
from tests.calibration.networks import distance, images, network, statistics
from tests.calibration.test_exact import EXACT


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from images()


X, LABELS = images(), torch.zeros(24)
FEEDS: dict[str, Any] = {
    "tensors": X.split(5),
    "an iterator": lambda: iter(X.split(5)),
    "lists": [[x, "a name"] for x in X.split(5)],
    "named tuples": [Pair(x, y) for x, y in zip(X.split(5), LABELS.split(5), strict=True)],
    "keywords": [{"input": x} for x in X.split(5)],
    "keywords of transformers": [UserDict(input=x) for x in X.split(5)],
    "a loader": DataLoader(TensorDataset(X, LABELS), batch_size=5),
    "a shuffling loader": DataLoader(TensorDataset(X, LABELS), batch_size=5, shuffle=True),
    "a stream": DataLoader(Stream(), batch_size=5),
}


@pytest.mark.parametrize("feed", FEEDS)
def test_batches_of_any_make(feed: str) -> None:
    batches = FEEDS[feed]() if callable(FEEDS[feed]) else FEEDS[feed]
    expected, net = network(), network()
    syncbn.recalibrate(expected, X.split(24))
    syncbn.recalibrate(net, batches)
    assert distance(statistics(net), statistics(expected)) < 1e-12


@pytest.mark.parametrize(
    ("number", "size", "together"),
    # 32 samples of 8x8; of 64x64 and float64, 96 KiB each, as many as stay below 256 KiB.
    [(70, 8, [32, 32, 6]), (5, 64, [2, 2, 1]), (2, 128, [1, 1])],
)
def test_lockstep_computes_small_batches_together(
    number: int, size: int, together: list[int]
) -> None:
    net, seen = network(), []
    x = torch.randn(number, 3, size, size, dtype=torch.float64)
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    syncbn.recalibrate(net, x.split(1))
    verified = [1, 1]
    assert seen == [1, *together, *verified]  # the memory of one sample is measured first


def test_a_forward_of_the_users_own() -> None:
    expected, net = network(), network()
    syncbn.recalibrate(expected, X.split(24))
    batches = [("ignored", (x,)) for x in X.split(7)]
    syncbn.recalibrate(net, batches, forward=lambda model, batch: model(batch[1][0]))
    assert distance(statistics(net), statistics(expected)) < 1e-12


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("batch_size", [3, 10, 24])
def test_a_number_of_samples(method: Any, batch_size: int) -> None:
    expected, net = network(), network()
    syncbn.recalibrate(expected, [X[:11]])
    batches = [{"input": x} for x in X.split(batch_size)]
    report = syncbn.recalibrate(net, batches, method=method, num_samples=11)
    assert distance(statistics(net), statistics(expected)) < 1e-12
    assert report.layers[0].samples == 11


def test_sequential_sees_the_same_random_batches_in_every_pass() -> None:
    """A loader that shuffles, and a subset of it: another one would show in the statistics."""
    expected, net = network(), network()
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=5, shuffle=True)
    torch.manual_seed(5)
    chosen = list(loader)[:2]
    torch.manual_seed(5)
    syncbn.recalibrate(net, loader, method="sequential", num_samples=10)
    syncbn.recalibrate(expected, chosen)
    assert distance(statistics(net), statistics(expected)) < 1e-12
