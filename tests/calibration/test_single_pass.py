"""Methods that normalize each batch with the batch's statistics, compared with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.calibration.networks import (
    collect_training_inputs,
    distance,
    images,
    layers,
    network,
    statistics,
)

BATCHES = [images(24)[:3], images(24)[3:10], images(24)[10:12], images(24)[12:]]


def _collect_training_inputs(batches: list[Tensor]) -> dict[str, list[Any]]:
    inputs = collect_training_inputs(network(), batches)
    return {name: [x.numpy() for x in values] for name, values in inputs.items()}


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
    net = network()
    before = statistics(net)
    with pytest.raises(ValueError, match=r"11: got a batch with one value per channel.*lockstep"):
        syncbn.recalibrate(net, images(4).split(1), method=method)  # type: ignore[arg-type]
    assert distance(statistics(net), before) == 0.0
