"""Pruned channels: the tensors define the size, num_features may be stale."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import syncbn
from syncbn.inference import prior_mix

KEPT_CHANNELS = torch.tensor([0, 2, 3, 6])


def _prune(layer: Any) -> None:
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[KEPT_CHANNELS]))
    for name in ("running_mean", "running_var"):
        if getattr(layer, name) is not None:
            setattr(layer, name, getattr(layer, name)[KEPT_CHANNELS])


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("converted_before", [True, False])
def test_pruned_layers_match_torch(options: dict[str, bool], converted_before: bool) -> None:
    """Regression: pruning scripts keep the old num_features, and the layer expected 9 channels."""
    # Of 9: the moments of 8 channels would have the length of two-part moments of 4.
    plain = nn.BatchNorm2d(9, **options)
    plain(torch.randn(4, 9, 3, 3) * 3 + 1)
    layer = copy.deepcopy(plain)
    if converted_before:
        syncbn.convert_sync_batchnorm(layer)
    for each in (plain, layer):
        _prune(each)
    if not converted_before:
        syncbn.convert_sync_batchnorm(layer)
    for training in (True, False):
        x = torch.randn(4, 4, 3, 3)
        torch.testing.assert_close(layer.train(training)(x), plain.train(training)(x))
        torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))
    x = torch.randn(8, 4, 3, 3)
    with syncbn.accumulate_statistics(layer):
        layer.train()(x[:4]), layer(x[4:])
    plain.train()(x)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("training", [True, False])
def test_number_of_channels(training: bool) -> None:
    """Without tensors it is arbitrary; with pruned ones, num_features is wrong."""
    options: Any = {"affine": False, "track_running_stats": False}
    layer, plain = syncbn.SyncBatchNorm1d(8, **options), nn.BatchNorm1d(8, **options)
    x = torch.randn(6, 5)
    torch.testing.assert_close(layer.train(training)(x), plain.train(training)(x))
    pruned = syncbn.SyncBatchNorm2d(8).train(training)
    _prune(pruned)
    with pytest.raises(
        ValueError, match=r"SyncBatchNorm2d\(8\): got an input .*expected 4 channels"
    ):
        pruned(torch.randn(2, 8, 3, 3))


def test_calibration_and_inference_rules_accept_pruned_layers() -> None:
    layer, plain = syncbn.SyncBatchNorm2d(8).eval(), nn.BatchNorm2d(4).eval()
    _prune(layer)
    x = torch.randn(6, 4, 3, 3)
    for model in (layer, plain):
        syncbn.recalibrate(model, [x])
    torch.testing.assert_close(layer.running_var, plain.running_var)
    with prior_mix(layer, 4), prior_mix(plain, 4):
        torch.testing.assert_close(layer(x), plain(x))
