"""User attributes of converted layers, under the library's names and under any other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from syncbn.inference import prior_mix

# Every name that any version of this library has read from a layer or set on one.
NAMES = (
    *("activation", "process_group", "impl", "fqn", "sync_name", "sync_kernel"),
    *("pending_moments", "inference_rule", "original_class", "cls_to_become"),
    *("active_group", "_label", "_tensors", "relu", "residual", "mask", "kernel", "layer_name"),
)


class Named(nn.BatchNorm2d):
    """Has its block's activation as an attribute and does not apply it."""

    def __init__(self, channels: int, activation: Any) -> None:
        super().__init__(channels)
        self.activation = activation


class ClassAttribute(nn.BatchNorm2d):
    activation: Any = "gelu"


class Computed(nn.BatchNorm2d):
    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        return torch.tanh


def _attached(activation: Any) -> Any:
    layer: Any = nn.BatchNorm2d(4)
    layer.activation = activation
    return layer


CARRIERS: dict[str, Callable[[], nn.BatchNorm2d]] = {
    "text": lambda: Named(4, "gelu"),
    "library text": lambda: Named(4, "relu"),
    "none": lambda: Named(4, None),
    "module": lambda: Named(4, nn.GELU()),
    "function": lambda: Named(4, torch.tanh),
    "of the class": lambda: ClassAttribute(4),
    "property": lambda: Computed(4),
    "attached text": lambda: _attached("gelu"),
    "attached module": lambda: _attached(nn.GELU()),
}


class Block(nn.Module):
    """Applies the activation that its layer has as an attribute."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 1), norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        activation: Any = self.norm.activation
        if activation is None:
            return y
        function: Any = activation if callable(activation) else getattr(F, activation)
        return torch.as_tensor(function(y))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_conversion_preserves_a_block_that_applies_the_activation(
    carrier: str, training: bool
) -> None:
    """Regression: the converted layer also applied the block's activation, or raised."""
    block: Any = Block(CARRIERS[carrier]()).train(training)
    before = block.norm.activation
    attributes, submodules = set(vars(block.norm)), dict(block.norm.named_children())
    x = torch.randn(5, 3, 4, 4)
    expected = copy.deepcopy(block)(x)
    syncbn.convert_sync_batchnorm(block)
    norm: Any = block.norm
    assert isinstance(norm, syncbn.SyncBatchNorm)
    assert norm.activation is before
    for make_copy in (copy.deepcopy, copy.copy, lambda b: pickle.loads(pickle.dumps(b))):
        torch.testing.assert_close(copy.deepcopy(make_copy(block))(x), expected)
    torch.testing.assert_close(block(x), expected)
    syncbn.revert_sync_batchnorm(block)
    assert type(block.norm) is type(CARRIERS[carrier]())
    assert id(block.norm.activation) == id(before)
    assert (set(vars(block.norm)), dict(block.norm.named_children())) == (attributes, submodules)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_inference_rules_ignore_user_activations(carrier: str) -> None:
    """Regression: a rule applied a ReLU if a layer had an attribute `activation`."""
    plain, x = nn.BatchNorm2d(4).eval(), torch.randn(5, 4, 3, 3)
    layer, converted = (CARRIERS[carrier]().eval() for _ in range(2))
    syncbn.convert_sync_batchnorm(converted)
    with prior_mix(layer, 4), prior_mix(converted, 4), prior_mix(plain, 4):
        for actual in (layer(x), converted(x)):
            torch.testing.assert_close(actual, plain(x))


@pytest.mark.parametrize("value", ["text", nn.Identity(), torch.ones(3)], ids=["text", "m", "t"])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Named], ids=["torch", "subclass"])
def test_library_ignores_user_attributes_of_any_name(kind: Any, value: Any) -> None:
    """Regression: user attributes replaced the library's group, name or kernel."""
    torch.manual_seed(0)
    layer: Any = kind(4, None) if kind is Named else kind(4)
    for name in NAMES:
        setattr(layer, name, value)
    plain, x = nn.BatchNorm2d(4), torch.randn(5, 4, 3, 3)
    model = syncbn.convert_sync_batchnorm(nn.Sequential(layer))
    assert isinstance(layer, syncbn.SyncBatchNorm)
    with syncbn.accumulate_statistics(model):
        torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(layer.running_var, plain.running_var)
    model.eval(), plain.eval()
    torch.testing.assert_close(model(x), plain(x))
    syncbn.recalibrate(model, [x])
    with prior_mix(plain, 4), prior_mix(model, 4):
        assert model(x).isfinite().all()
    assert all(getattr(layer, name) is value for name in NAMES)
    syncbn.revert_sync_batchnorm(model)
    assert type(layer) is kind
    assert all(getattr(layer, name) is value for name in NAMES)


class Conditional(nn.BatchNorm2d):
    """forward() has the library's argument names and positions with other meanings."""

    def forward(self, input: Tensor, domain: int, mask: str) -> Tensor:  # type: ignore[override]
        assert (domain, mask) == (1, "night")
        return super().forward(input)


def test_calibration_ignores_a_mask_argument_of_a_user_layer() -> None:
    """Regression: the third argument was taken for a mask, which calibration refuses."""
    layer, x = Conditional(4).eval(), torch.randn(6, 4, 3, 3)
    syncbn.recalibrate(layer, [x], forward=lambda model, batch: model(batch, 1, "night"))
    plain = nn.BatchNorm2d(4, momentum=1.0)
    plain(x)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_fuse_stores_its_activation_apart_from_the_users() -> None:
    """The library stores its activation under a private name."""
    model = nn.Sequential(Named(4, "gelu"), nn.ReLU())
    x = torch.randn(5, 4, 3, 3)
    expected = copy.deepcopy(model)(x)
    syncbn.convert_sync_batchnorm(model)
    fusion = syncbn.fuse(model)
    assert fusion.fused == {"0": "relu"}
    torch.testing.assert_close(model(x), expected)
    assert model[0].activation == "gelu"
    with pytest.raises(ValueError, match="got a layer with activation='relu'"):
        syncbn.revert_sync_batchnorm(model)
    fusion.undo()
    torch.testing.assert_close(syncbn.revert_sync_batchnorm(model)(x), expected)


def test_activation_of_converted_layers() -> None:
    """Regression: ``getattr(norm, "activation", "relu")`` returned None after conversion."""
    layer: Any = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(4))
    assert getattr(layer, "activation", "relu") == "relu"
    assert not hasattr(copy.deepcopy(layer), "activation")
    layer.activation = "relu"
    assert layer.activation == "relu"
    x = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(4)(x).relu())


def test_missing_attribute_raises_attribute_error() -> None:
    """Layers of user classes lack the public names."""
    layer: Any = syncbn.convert_sync_batchnorm(ClassAttribute(4))
    assert not hasattr(layer, "process_group")
    with pytest.raises(AttributeError, match="no attribute 'impl'"):
        _ = layer.impl
