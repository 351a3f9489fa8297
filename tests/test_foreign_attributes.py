"""Attributes of a user's layer under names of this library, or under any name."""

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

# Every name that this library has ever read from a layer, or given to one.
NAMES = (
    *("activation", "process_group", "sync_name", "sync_kernel", "pending_moments"),
    *("inference_rule", "original_class", "cls_to_become", "communicating_group"),
    *("_label", "_tensors", "relu", "residual", "mask", "kernel"),
)


class Named(nn.BatchNorm2d):
    """Carries the activation of its block, and does not apply it."""

    def __init__(self, channels: int, activation: Any) -> None:
        super().__init__(channels)
        self.activation = activation


class OfTheClass(nn.BatchNorm2d):
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
    "ours": lambda: Named(4, "relu"),
    "none": lambda: Named(4, None),
    "module": lambda: Named(4, nn.GELU()),
    "function": lambda: Named(4, torch.tanh),
    "of the class": lambda: OfTheClass(4),
    "property": lambda: Computed(4),
    "attached text": lambda: _attached("gelu"),
    "attached module": lambda: _attached(nn.GELU()),
}


class Block(nn.Module):
    """Applies the activation that its layer carries, and counts the calls."""

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
def test_conversion_keeps_the_function_of_a_block(carrier: str, training: bool) -> None:
    """The converted layer applied the activation that its block applies, or refused it."""
    block: Any = Block(CARRIERS[carrier]()).train(training)
    before = block.norm.activation
    attributes, submodules = set(vars(block.norm)), dict(block.norm.named_children())
    x = torch.randn(5, 3, 4, 4)
    wanted = copy.deepcopy(block)(x)
    syncbn.convert_sync_batchnorm(block)
    norm: Any = block.norm
    assert isinstance(norm, syncbn.SyncBatchNorm)
    assert norm.activation is before
    for made in (copy.deepcopy, copy.copy, lambda b: pickle.loads(pickle.dumps(b))):
        torch.testing.assert_close(copy.deepcopy(made(block))(x), wanted)
    torch.testing.assert_close(block(x), wanted)
    syncbn.revert_sync_batchnorm(block)
    assert type(block.norm) is type(CARRIERS[carrier]())
    assert id(block.norm.activation) == id(before)
    assert (set(vars(block.norm)), dict(block.norm.named_children())) == (attributes, submodules)


@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_rule_of_inference_applies_no_activation(carrier: str, converted: bool) -> None:
    """A rule applied a ReLU wherever a layer had an attribute of that name."""
    layer, plain = CARRIERS[carrier]().eval(), nn.BatchNorm2d(4).eval()
    if converted:
        syncbn.convert_sync_batchnorm(layer)
    x = torch.randn(5, 4, 3, 3)
    with prior_mix(layer, 4), prior_mix(plain, 4):
        torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("value", ["text", nn.Identity(), torch.ones(3)], ids=["text", "m", "t"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Named], ids=["torch", "subclass"])
def test_no_name_is_read_that_the_library_has_not_set(kind: Any, name: str, value: Any) -> None:
    """A group, a name or a kernel of the user's replaced the library's."""
    torch.manual_seed(0)
    layer: Any = kind(4, None) if kind is Named else kind(4)
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
    assert getattr(layer, name) is value
    syncbn.revert_sync_batchnorm(model)
    assert type(layer) is kind
    assert getattr(layer, name) is value


class Conditional(nn.BatchNorm2d):
    """Takes arguments with our names and positions, and other meanings."""

    def forward(self, input: Tensor, domain: int, mask: str) -> Tensor:  # type: ignore[override]
        assert (domain, mask) == (1, "night")
        return super().forward(input)


def test_calibration_reads_no_mask_from_a_layer_of_the_users() -> None:
    """Its third argument was taken for a mask, which calibration refuses."""
    layer, x = Conditional(4).eval(), torch.randn(6, 4, 3, 3)
    syncbn.recalibrate(layer, [x], forward=lambda model, batch: model(batch, 1, "night"))
    plain = nn.BatchNorm2d(4, momentum=1.0)
    plain(x)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_fuse_reaches_a_layer_that_carries_an_activation() -> None:
    """The library's own activation is stored apart from the user's."""
    model = nn.Sequential(Named(4, "gelu"), nn.ReLU())
    x = torch.randn(5, 4, 3, 3)
    wanted = copy.deepcopy(model)(x)
    syncbn.convert_sync_batchnorm(model)
    fusion = syncbn.fuse(model)
    assert fusion.fused == {"0": "relu"}
    torch.testing.assert_close(model(x), wanted)
    assert model[0].activation == "gelu"
    with pytest.raises(ValueError, match="got a layer with activation='relu'"):
        syncbn.revert_sync_batchnorm(model)
    fusion.undo()
    torch.testing.assert_close(syncbn.revert_sync_batchnorm(model)(x), wanted)


def test_the_activation_of_our_own_layers_is_public() -> None:
    """It can be passed, read, set and taken away."""
    layer, x = syncbn.SyncBatchNorm2d(4, activation="relu"), torch.randn(5, 4, 3, 3)
    plain = nn.BatchNorm2d(4)(x)
    assert layer.activation == "relu"
    assert "activation='relu'" in str(layer)
    torch.testing.assert_close(layer(x), plain.relu())
    layer.activation = None
    torch.testing.assert_close(layer(x), plain)
    converted: Any = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(4))
    converted.activation = "relu"
    torch.testing.assert_close(converted(x), plain.relu())


def test_a_plain_attribute_error_for_a_missing_attribute() -> None:
    """The public names exist on our classes, and not on a user's."""
    layer: Any = syncbn.convert_sync_batchnorm(OfTheClass(4))
    assert not hasattr(layer, "process_group")
    with pytest.raises(AttributeError, match="no attribute 'sync_kernel'"):
        _ = layer.sync_kernel


def test_pickles_of_the_public_names_load() -> None:
    """Earlier versions stored the settings under the public names."""
    for layer in (syncbn.SyncBatchNorm2d(4), syncbn.convert_sync_batchnorm(Named(4, "gelu"))):
        state = layer.__getstate__()
        settings = {name: state.pop(name) for name in list(state) if name.startswith("_syncbn_")}
        assert set(settings) >= {"_syncbn_group"}
        public = {"process_group": None, "sync_name": "stem", "sync_kernel": "reference"}
        if type(layer) is syncbn.SyncBatchNorm2d:
            public["activation"] = "relu"
        clone: Any = type(layer).__new__(type(layer))
        clone.__setstate__({**state, **public})
        y = clone(torch.randn(5, 4, 3, 3))
        assert (clone._syncbn_name, clone._syncbn_kernel) == ("stem", "reference")
        assert (y.min() >= 0) == (type(layer) is syncbn.SyncBatchNorm2d)
        assert clone.activation == ("relu" if "activation" in public else "gelu")


def test_a_converted_layer_has_no_activation_to_read() -> None:
    """A block that reads ``getattr(norm, "activation", "relu")`` found None after conversion."""
    layer: Any = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3))
    assert getattr(layer, "activation", "relu") == "relu"
    assert not hasattr(copy.deepcopy(layer), "activation")
    assert syncbn.SyncBatchNorm2d(3).activation is None
    layer.activation = "relu"
    assert layer.activation == "relu"
