"""Interleaved and coalesced passes of lockstep: they change no layer input and no batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.nn.bn_layers import find_layers
from tests.calibration.networks import (
    EXACT,
    compute_population_stats,
    distance,
    layers,
    run_batch,
    statistics,
)
from tests.calibration.stateful import EQUAL, EVEN, LARGE, REPLACED, Layers, features

pytestmark = pytest.mark.filterwarnings("ignore:lockstep is not possible")


class TimeMajor(nn.Module):
    """Recurrent network over ``[T, N, C]``: coalesced batches are longer sequences."""

    def __init__(self, scale: float = 1.0, reverse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.rnn, self.norm = nn.GRU(4, 6), nn.BatchNorm1d(6)
        self.scale, self.reverse = scale, reverse
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(3, -1, 4) if x.dim() == 2 else x
        h: Tensor = self.rnn(x.flip(0))[0].flip(0) if self.reverse else self.rnn(x)[0]
        y: Tensor = self.norm(h.flatten(0, 1) * self.scale)
        return y


@pytest.mark.parametrize(
    ("dtype", "scale", "old_var", "bound"),
    [
        (torch.float64, 1.0, 1.0, 1e-12), (torch.float32, 1.0, 1e8, 1e-5),
        (torch.float32, 3e-4, 1.0, 1e-5), (torch.float32, 1e-8, 1.0, 1e-5),
        (torch.bfloat16, 0.1, 1.0, 0.02), (torch.float16, 0.1, 1e4, 0.004),
    ],
)  # fmt: skip
@pytest.mark.parametrize("reverse", [False, True])
def test_time_major_batches_are_not_coalesced(
    dtype: torch.dtype, scale: float, old_var: float, bound: float, reverse: bool
) -> None:
    """Variances were 73 % off: old statistics hid the difference; a causal prefix has none."""
    expected, net = (TimeMajor(scale, reverse).to(dtype) for _ in range(2))
    layers(net)["norm"].running_var.fill_(old_var)
    batches = [x.to(dtype).unflatten(0, (3, 4)) for x in features((12,) * 8)]
    report = syncbn.recalibrate(net, batches)
    assert distance(statistics(net), compute_population_stats(expected, *batches)) < bound
    assert report.verification.startswith(f"inputs of 1 layers for 2 batches {EQUAL}")


class Halves(Layers):
    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2)
        return super().forward((one - two).abs())


class SpreadOverTheBatch(Layers):
    def between(self, x: Tensor) -> Tensor:
        return x * x.std(0, unbiased=False)


class FixedBatchSize(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(6, 4) if len(x) > 1 else x)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("kind", [TimeMajor, Halves, SpreadOverTheBatch, FixedBatchSize])
def test_coalescing_only_without_effect(kind: Callable[[], Any], equal: bool) -> None:
    """Small batches were coalesced, which is another input for these networks.

    Two equal batches have the spread of one; coalesced batches have another spread.
    """
    net, batches = kind(), features()
    batches[1] = batches[0] if equal else batches[1]
    report = syncbn.recalibrate(net, batches)
    assert distance(statistics(net), compute_population_stats(kind(), *batches)) < 1e-9
    number = len(find_layers(net))
    assert report.verification.startswith(f"inputs of {number} layers for 2 batches {EQUAL}")


class CalledTwice(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


@pytest.mark.filterwarnings("ignore:.*called more than once")
def test_fixed_point_profiles_and_verifies_once() -> None:
    """Every iteration measured the memory, and ran two single passes."""
    net, seen = CalledTwice(), []
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    report = syncbn.recalibrate(net, features((33, 34, 35)))
    assert seen.count(35) > 2
    assert [seen.count(size) - seen.count(35) for size in (33, 34)] == [1, 1]
    assert len(seen) == 3 * seen.count(35) + 3
    assert EQUAL in report.verification


class NotReentrant(Layers):
    """A second forward raises; a first forward that is killed leaves the module busy."""

    busy: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.busy is None
        self.busy = x
        y = super().forward(x)
        self.busy = None
        return y


@pytest.mark.parametrize(
    ("sizes", "forward"), [(EVEN, None), (LARGE, None), ((20, 20, 20), None), (EVEN, run_batch)]
)
def test_non_reentrant_forward(sizes: tuple[int, ...], forward: Any) -> None:
    """Calibration ended with the AssertionError of the second forward."""
    net, batches = NotReentrant(), features(sizes)
    report = syncbn.recalibrate(net, iter(batches), forward=forward)
    assert distance(statistics(net), compute_population_stats(NotReentrant(), *batches)) < 1e-12
    assert REPLACED in report.verification or (forward is None and sizes is EVEN)


class InPlace(Layers):
    """Normalizes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(1.0).mul_(0.5)
        return super().forward(x)


@pytest.mark.parametrize("method", [*EXACT, "pooled"])
def test_in_place_forward(method: Any) -> None:
    """A batch that ran twice was normalized twice, and the caller's data changed."""
    net, expected, batches = InPlace(), Layers(), features()
    normalized = [(x - 1) * 0.5 for x in batches]
    report = syncbn.recalibrate(net, batches, method=method)
    if method == "pooled":
        syncbn.recalibrate(expected, normalized, method=method)
    else:
        compute_population_stats(expected, *normalized)
    assert distance(statistics(net), statistics(expected)) < 1e-12
    assert torch.equal(torch.cat(batches), torch.cat(features()))
    assert EQUAL in report.verification or method != "lockstep"


class OverwritesALayersInput(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inner[0](x)
        y: Tensor = self.norms[0](x)
        x.zero_()
        return y


@pytest.mark.parametrize("method", [*EXACT, "pooled"])
def test_overwritten_layer_input(method: Any) -> None:
    """Statistics of inputs ``[N, C]`` shared their memory and were read too late."""
    net = OverwritesALayersInput()
    with torch.no_grad():
        values = torch.cat([net.inner[0](x) for x in features()])
    syncbn.recalibrate(net, features(), method=method, forward=run_batch)
    torch.testing.assert_close(net.norms[0].running_var, values.var(0))
    torch.testing.assert_close(net.norms[0].running_mean, values.mean(0))
