"""Methods that normalize each batch with the batch's statistics, compared with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.calibration.networks import (
    distance,
    images,
    layers,
    network,
    require_error,
    statistics,
)

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
