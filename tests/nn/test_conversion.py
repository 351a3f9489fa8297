"""Conversion and reversion of models."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers import ResNetConfig, ResNetForImageClassification

import syncbn
from tests.transports import ROOT


class Scaled(nn.BatchNorm2d):
    """Subclass with a constructor and a method that inherits forward."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)
        self.label = "mine"

    def shout(self) -> str:
        return self.label.upper()


class Activated(nn.BatchNorm2d):
    """Subclass that overrides forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class AnyDimension(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim != 3:
            raise ValueError("three, please")


def nested() -> Any:
    shared = nn.BatchNorm2d(4)
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU()),
            body=nn.Sequential(nn.Conv2d(4, 4, 1), shared),
            others=nn.Sequential(nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(62)),
            again=nn.Sequential(Scaled(4), nn.Conv2d(4, 6, 1, bias=False)),
            head=nn.BatchNorm2d(6, affine=False, momentum=None),
            flat=nn.Flatten(),
        )
    )


def classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def test_convert_and_revert_are_inverse_on_a_nested_model() -> None:
    model = nested().eval()
    model.head.train()
    model.stem[1].weight.requires_grad_(False)
    model.stem[1].double()
    before = classes(model)
    kinds = [isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    flags = [module.training for module in model.modules()]

    assert syncbn.convert_sync_batchnorm(model) is model
    assert [isinstance(module, syncbn.SyncBatchNorm) for module in model.modules()] == kinds
    assert model.stem[1] is model.body[1]
    assert model.stem[1].fqn == "stem.1"
    assert [module.training for module in model.modules()] == flags
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == identities
    assert not model.stem[1].weight.requires_grad

    assert syncbn.revert_sync_batchnorm(model) is model
    assert classes(model) == before
    assert [set(module.__dict__) for module in model.modules()] == attributes


def resnet() -> Any:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1])
    config.num_labels = 5
    return ResNetForImageClassification(config)


def test_hooks_survive_conversion_and_reversion() -> None:
    layer = nn.BatchNorm2d(3)
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    handle = layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    syncbn.convert_sync_batchnorm(layer)
    layer(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]
    handle.remove()
    syncbn.revert_sync_batchnorm(layer)
    layer(torch.randn(2, 3, 4, 4))
    assert seen[3:] == ["before"]


def test_subclass_keeps_class_attributes_and_copies() -> None:
    layer = Scaled(4)
    syncbn.convert_sync_batchnorm(layer)
    assert isinstance(layer, Scaled)
    assert isinstance(layer, syncbn.SyncBatchNorm)
    assert layer.shout() == "MINE"
    assert layer.eps == 1e-3
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(clone) is type(layer)
        assert clone.label == "mine"
        assert type(syncbn.revert_sync_batchnorm(clone)) is Scaled
    assert type(syncbn.convert_sync_batchnorm(Scaled(2))) is type(layer)


def test_subclass_keeps_its_input_dim_check() -> None:
    layer = syncbn.convert_sync_batchnorm(AnyDimension(4))
    layer(torch.randn(2, 4, 3))
    with pytest.raises(ValueError, match="three, please"):
        layer(torch.randn(2, 4))


def test_torch_sync_batch_norm_round_trip() -> None:
    layer: Any = syncbn.convert_sync_batchnorm(nn.SyncBatchNorm(4))
    assert type(layer) is syncbn.SyncBatchNorm
    layer(torch.randn(2, 4, 5))
    syncbn.revert_sync_batchnorm(layer)
    assert classes(layer) == [nn.SyncBatchNorm]
    assert set(layer.__dict__) == set(nn.SyncBatchNorm(4).__dict__)


class LazySubclass(nn.LazyBatchNorm2d):
    pass


LAZY: list[tuple[Callable[..., nn.Module], type[nn.Module], int]] = [
    (nn.LazyBatchNorm1d, syncbn.SyncBatchNorm1d, 3),
    (nn.LazyBatchNorm2d, syncbn.SyncBatchNorm2d, 4),
    (LazySubclass, syncbn.SyncBatchNorm2d, 4),
    (nn.LazyBatchNorm3d, syncbn.SyncBatchNorm3d, 5),
]


@pytest.mark.parametrize(("lazy", "becomes", "ndim"), LAZY)
def test_lazy_layers_convert_before_the_first_input(
    lazy: Callable[..., nn.Module], becomes: type[nn.Module], ndim: int
) -> None:
    x = torch.randn(3, 6, *(4,) * (ndim - 2))
    reference, layer = lazy(), lazy()
    syncbn.convert_sync_batchnorm(layer)
    assert isinstance(layer, (becomes, LazySubclass))
    torch.testing.assert_close(layer(x), reference(x))
    assert type(layer) is becomes
    assert type(syncbn.revert_sync_batchnorm(layer)) is type(reference)
    untouched: Any = lazy()
    syncbn.revert_sync_batchnorm(syncbn.convert_sync_batchnorm(untouched))
    assert type(untouched) is type(lazy())
    untouched(x)


def test_parametrizations_survive_and_change_while_converted() -> None:
    layer: Any = parametrizations.weight_norm(nn.BatchNorm2d(4), dim=0)
    for change in (syncbn.convert_sync_batchnorm, syncbn.revert_sync_batchnorm):
        change(layer)
        assert isinstance(layer, syncbn.SyncBatchNorm) == (change is syncbn.convert_sync_batchnorm)
        assert parametrize.is_parametrized(layer, "weight")
        for module in (layer, copy.deepcopy(layer)):
            module(torch.randn(2, 4, 3, 3)).sum().backward()
    syncbn.convert_sync_batchnorm(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is syncbn.SyncBatchNorm2d
    parametrizations.weight_norm(layer, dim=0)
    syncbn.revert_sync_batchnorm(layer)
    assert parametrize.is_parametrized(layer, "weight")
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.BatchNorm2d


class Guarded(nn.BatchNorm2d):
    """Overrides a method that the synchronized layer must replace."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "guarded": True}


class TorchSync(nn.SyncBatchNorm):
    """Converted, it would stay an nn.SyncBatchNorm, which DDP refuses on CPU."""


def instance_forward() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Activated(4), "Activated overrides forward"),
        (instance_forward(), "a BatchNorm2d overrides forward as an attribute"),
        (Guarded(4), "Guarded defines __getstate__"),
        (TorchSync(4), "TorchSync overrides forward"),
    ],
)
def test_unsupported_layers_are_skipped_with_the_reason(layer: nn.Module, reason: str) -> None:
    model, before = nn.Sequential(nn.BatchNorm2d(4), layer), type(layer)
    expected = rf"{reason}, so these layers are left unsynchronized: 1\."
    with pytest.warns(UserWarning, match=expected):
        syncbn.convert_sync_batchnorm(model)
    assert classes(model)[1:] == [syncbn.SyncBatchNorm2d, before]


def test_classes_of_library_layers() -> None:
    class Subclass(syncbn.SyncBatchNorm2d):
        pass

    model = nn.Sequential(syncbn.SyncBatchNorm1d(2), syncbn.SyncBatchNorm3d(2), Subclass(3))
    syncbn.revert_sync_batchnorm(syncbn.convert_sync_batchnorm(model))
    assert classes(model)[1:] == [nn.BatchNorm1d, nn.BatchNorm3d, Subclass]
    # A classmethod, as in torch.
    model = syncbn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(2)))
    assert isinstance(model[0], syncbn.SyncBatchNorm1d)


def test_groups_need_an_initialized_process_group() -> None:
    with pytest.raises(RuntimeError, match="call syncbn"):
        syncbn.convert_sync_batchnorm(nn.BatchNorm2d(2), process_group=2)
    with pytest.raises(ValueError, match="got process group 'rack'; expected 'world', 'own'"):
        syncbn.convert_sync_batchnorm(nn.BatchNorm2d(2), process_group="rack")


#: One of each kind of layer that has a batch norm and more.
TIMM = [
    *("test_resnet", "test_efficientnet", "test_byobnet", "test_mambaout", "test_vit"),
    *("skresnet18", "mobilevit_xxs", "regnetx_002"),
    *("ghostnet_050", "repvgg_a0", "mobilenetv3_small_050"),
]


def test_timm_networks_are_converted_and_unchanged() -> None:
    """A separate process, in which timm sees names of torchvision; tests/timm_sweep.py: the zoo."""
    command = [sys.executable, "-m", "tests.timm_sweep", *TIMM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 models with batch norm, 0 failed" in done.stdout
