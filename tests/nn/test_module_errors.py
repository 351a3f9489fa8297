"""Inputs and arguments that the layers refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn

import syncbn
from tests.device import on_cpu

pytestmark = pytest.mark.layers


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(4), ValueError, r"shape \(4,\); expected at least 2 dimensions"),
        (torch.randn(4, 5), ValueError, r"shape \(4, 5\); expected 3 channels"),
        (torch.randn(4, 0), ValueError, "without channels"),
        (torch.zeros(4, 3, dtype=torch.int64), ValueError, "torch.int64; expected float16"),
        (torch.zeros(4, 3, dtype=torch.complex64), ValueError, "torch.complex64"),
        pytest.param(torch.randn(1, 3), ValueError, "single value per channel", marks=on_cpu),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_input(x: Tensor, error: type[Exception], message: str, training: bool) -> None:
    layer = syncbn.SyncBatchNorm(3).train(training)
    before = copy.deepcopy(layer.state_dict())
    if not training and message.startswith("single"):
        layer(x)
        return
    with pytest.raises(error, match=message):
        layer(x)
    for name, value in layer.state_dict().items():
        assert torch.equal(before[name], value)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (syncbn.SyncBatchNorm1d(3), (2, 3, 4, 4)),
        (syncbn.SyncBatchNorm2d(3), (2, 3, 4)),
        (syncbn.SyncBatchNorm3d(3), (2, 3, 4, 4)),
    ],
)
def test_dimensions_are_checked_as_in_torch(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected .*D input"):
        layer(torch.randn(shape))


def test_functional_names_the_tensor_of_the_wrong_length() -> None:
    x, three = torch.randn(4, 3), torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"expected 4 channels in dimension 1, as in weight of shape \(4,\)"
    ):
        syncbn.sync_batch_norm(x, three, three, weight=torch.ones(4), training=True)
    with pytest.raises(ValueError, match="expected both when training is False"):
        syncbn.sync_batch_norm(x, None, None)


@pytest.mark.parametrize("activation", ["elu", nn.ReLU(), torch.relu])
def test_unknown_activations(activation: object) -> None:
    """A module was registered, printed, and not applied."""
    wrong: Any = activation
    with pytest.raises(ValueError, match=r"expected 'relu', 'relu6', .* or None"):
        syncbn.SyncBatchNorm2d(3, activation=wrong)
    layer = syncbn.SyncBatchNorm2d(3)
    with pytest.raises(ValueError, match=r"expected 'relu', 'relu6', .* or None"):
        layer.activation = wrong
    assert "activation" not in str(layer)


def test_a_mask_that_is_no_tensor() -> None:
    wrong: Any = [True]
    with pytest.raises(ValueError, match="got a mask of type list; expected a bool tensor"):
        syncbn.SyncBatchNorm2d(3)(torch.randn(2, 3, 4, 4), mask=wrong)


@on_cpu
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own call
def test_a_single_value_under_forward_mode_differentiation() -> None:
    x = torch.randn(1, 3)
    with fwad.dual_level(), pytest.raises(ValueError, match="single value per channel"):
        syncbn.SyncBatchNorm(3)(fwad.make_dual(x, torch.ones_like(x)))
