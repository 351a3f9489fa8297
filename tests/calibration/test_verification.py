"""Verification of lockstep: models with interfering passes also get exact statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from syncbn.bench.networks import resnet20
from syncbn.calibration.checks import Trace
from syncbn.nn.bn_layers import find_layers
from tests.calibration.networks import (
    compute_population_stats,
    distance,
    network,
    require_error,
    run_batch,
    statistics,
)
from tests.calibration.networks import images as pictures
from tests.calibration.stateful import (
    EQUAL,
    EVEN,
    LARGE,
    REPLACED,
    SIZES,
    STATEFUL,
    Layers,
    QueueOfSkips,
    SkipOnTheModule,
    features,
)

pytestmark = pytest.mark.filterwarnings("ignore:lockstep is not possible")
# The default forward coalesces small batches, and nothing is interleaved. A failed pass leaves
# entries in its queue, so the queue is tried with equal batches only.
CASES = [
    *((kind, EVEN, run_batch) for kind in STATEFUL),
    *((kind, sizes, None) for kind in STATEFUL if kind is not QueueOfSkips for sizes in SIZES),
]


@pytest.mark.parametrize(("kind", "sizes", "forward"), CASES)
def test_stateful_models_are_exact(
    kind: Callable[[], Layers], sizes: tuple[int, ...], forward: Any
) -> None:
    """Interleaved passes read each other's state: variances were off by up to 200 %."""
    net, batches = kind(), features(sizes)
    source: Any = iter(batches) if sizes is LARGE else batches
    report = syncbn.recalibrate(net, source, forward=forward)
    assert distance(statistics(net), compute_population_stats(kind(), *batches)) < 1e-9
    assert REPLACED in report.verification or (forward is None and sizes is not LARGE)
    assert report.verification in " ".join(report.table().split())


def test_num_samples_of_iterator() -> None:
    """Both methods must read the same part of one-shot data."""
    net, batches = SkipOnTheModule(), features()
    report = syncbn.recalibrate(net, iter(batches), num_samples=20, forward=run_batch)
    expected = compute_population_stats(SkipOnTheModule(), *batches[:3], batches[3][:2])
    assert distance(statistics(net), expected) < 1e-12
    assert [layer.samples for layer in report.layers] == [20] * 3
    assert REPLACED in report.verification


class ScaleOnTheModule(Layers):
    """Scale that differs slightly between batches."""

    def __init__(self, strength: float, mask: torch.dtype) -> None:
        super().__init__()
        self.strength, self.mask = strength, torch.zeros(4, dtype=mask)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.scale = 1.0 + self.strength * float(x.float().mean() > 2)
        return super().forward(x)

    def between(self, x: Tensor) -> Tensor:
        return (x + self.mask.clone()) * self.scale


@pytest.mark.parametrize(
    ("dtype", "mask", "strength"),
    [
        (torch.float16, torch.float16, 0.01),
        (torch.bfloat16, torch.bfloat16, 0.05),
        (torch.float32, torch.bfloat16, 0.01),
    ],
)
def test_small_interference_in_half_precision(
    dtype: torch.dtype, mask: torch.dtype, strength: float
) -> None:
    """One tensor of a coarse dtype raised the bound to 9 %."""
    expected, net = (ScaleOnTheModule(strength, mask).to(dtype) for _ in range(2))
    batches = [x.to(dtype) for x in features((64,) * 5)]
    report = syncbn.recalibrate(net, batches, forward=run_batch)
    error = distance(statistics(net), compute_population_stats(expected, *batches))
    assert error <= torch.finfo(dtype).eps * 4
    assert REPLACED in report.verification


class Noise(Layers):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=True) + torch.randn_like(x)


def test_random_forward_is_no_interference() -> None:
    """Interleaved passes share a generator, so a single pass would draw other numbers."""
    net, batches = Noise(), features((1000,) * 5)
    report = syncbn.recalibrate(net, iter(batches))
    assert EQUAL in report.verification
    linear: Any = net.inner
    with torch.no_grad():
        inputs = linear[0](torch.cat(batches))
    torch.testing.assert_close(net.norms[0].running_var, inputs.var(0))
    # Dropout adds p/(1-p) of the second moment, here 1, to the variance; the noise adds 1.
    outputs = (inputs - inputs.mean(0)) / inputs.std(0)
    cov = torch.cov(outputs.T) + torch.eye(4) * (0.3 / 0.7 + 1.0)
    weight = linear[1].weight.detach()
    var = (weight @ cov @ weight.T).diagonal()
    torch.testing.assert_close(net.norms[1].running_var, var, rtol=0.1, atol=0.0)


@pytest.mark.parametrize(
    ("make", "dtype", "autocast", "batch_size"),
    [
        (network, torch.float64, None, 1), (network, torch.float32, None, 4),
        (network, torch.bfloat16, None, 1), (network, torch.float16, None, 4),
        (resnet20, torch.float32, None, 1), (resnet20, torch.float32, torch.bfloat16, 4),
        (resnet20, torch.bfloat16, None, 4), (resnet20, torch.float16, None, 4),
    ],
)  # fmt: skip
def test_rounding_is_no_interference(
    make: Any, dtype: torch.dtype, autocast: torch.dtype | None, batch_size: int
) -> None:
    """Kernels round differently for another batch size."""
    net = make().to(dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        report = syncbn.recalibrate(net, pictures(12, dtype).split(batch_size))
    assert EQUAL in report.verification


def test_single_batch_is_not_verified() -> None:
    calls: list[int] = []
    net = network()
    net.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    report = syncbn.recalibrate(net, [pictures()])
    assert report.verification == "a single batch on each rank; nothing was interleaved"
    assert calls == [1, 24]
    assert syncbn.recalibrate(net, [pictures()], method="sequential").verification == ""


def test_failed_fallback_raises() -> None:
    """Wrong statistics of lockstep must not remain."""

    class Alternating:
        """Re-iterable, with other batches in every second pass."""

        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            yield from features()[: 4 + self.passes % 2]

    message = r"lockstep is not possible \(norms.1: the input differs .*failed: .*the same data"
    require_error(SkipOnTheModule(), message, Alternating(), forward=run_batch)


def test_trace_size_is_bounded() -> None:
    layer = find_layers(nn.BatchNorm1d(4))[0]
    trace = Trace(None, (0, 500, 1000))
    trace.add(layer, torch.arange(1000.0)[:, None].expand(1000, 4))
    rows = trace.entries[0][1].mean[:, 0]
    assert len(rows) <= 32
    assert rows[0] == 0
    assert 480 <= rows[-1] < 500
