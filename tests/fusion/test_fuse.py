"""Fusion of ReLUs and residuals into layers: equal results, and undo."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import syncbn
from syncbn.bench.networks import resnet20, resnet50
from tests.fusion import models
from tests.fusion.checks import check_fused, train_on_rank
from tests.fusion.models import Methods, Plain, Residuals
from tests.nn.test_conversion import resnet as network
from tests.ranks import Ranks

pytestmark = pytest.mark.layers


@pytest.mark.parametrize(
    ("build", "size", "residuals", "relus"),
    [
        pytest.param(resnet20, 8, 9, 10, id="resnet20"),
        # A bottleneck with a projection, and one without.
        pytest.param(lambda: nn.Sequential(*[*resnet50().children()][:6]), 32, 2, 5, id="resnet50"),
        pytest.param(network, 32, 5, 11, id="transformers"),
    ],
)
def test_networks_are_fused_and_restored(
    build: Callable[[], nn.Module], size: int, residuals: int, relus: int
) -> None:
    fused = check_fused(build(), torch.randn(3, 3, size, size, dtype=torch.float64))
    kinds = list(fused.values())
    assert (kinds.count("residual, relu"), kinds.count("relu")) == (residuals, relus)
    names = [name for name, _ in build().named_modules() if name in fused]
    assert list(fused) == names


@pytest.mark.parametrize(
    ("model", "fused"),
    [
        (Plain, {"bn": "relu", "other": "relu", "body.1": "relu"}),
        (Methods, {"bn": "relu", "other": "relu"}),
        (Residuals, {"bn": "residual, relu", "other": "residual, relu"}),
        (
            models.OtherResiduals,
            dict.fromkeys(("bn", "other", "deep.1.1", "last"), "residual, relu"),
        ),
        (
            models.Parent,
            {
                "block.deep.1.1": "residual, relu",
                "others.0.deep.1.1": "relu",
                **{f"others.1.{name}": "relu" for name in ("bn", "other", "body.1")},
            },
        ),
        (
            models.Activations,
            {
                "blocks.0.0": "relu6",
                "blocks.1.0": "leaky_relu",
                "blocks.2.0": "silu",
                "blocks.3.0": "hardswish",
                "blocks.4.0": "gelu",
                "norms.0": "relu6",
                "norms.1": "leaky_relu",
                "norms.2": "residual, leaky_relu",
                "norms.3": "residual, silu",
                "norms.4": "hardswish",
                "norms.5": "gelu",
            },
        ),
        (models.OtherActivations, {}),
        (models.TorchvisionBlock, {"bn": "relu", "other": "residual, relu"}),
        (models.TorchvisionDownsample, {"bn": "relu", "downsample.1": "residual, relu"}),
        # Fusion would change the results.
        *((model, {}) for model in models.NOT_FUSED),
    ],
)
def test_fused_patterns(model: Callable[[], nn.Module], fused: dict[str, str]) -> None:
    assert check_fused(model(), torch.randn(5, 3, dtype=torch.float64)) == fused


def test_layer_is_not_moved_past_a_write() -> None:
    model = syncbn.convert_sync_batchnorm(models.Writes()).eval()
    x = torch.randn(5, 3)
    wanted = model(x)
    assert syncbn.fuse(model).fused == {}
    torch.testing.assert_close(model(x), wanted)


def test_instance_forward_is_not_rewritten() -> None:
    model: Any = syncbn.convert_sync_batchnorm(Methods())
    other: Any = copy.deepcopy(model)
    model.forward = lambda x: x
    assert syncbn.fuse(model).skipped == {"": "its forward is an attribute of the instance"}
    other.bn.forward = lambda x: x
    assert syncbn.fuse(other).fused == {"other": "relu"}


def test_hooked_modules_are_not_fused() -> None:
    model = syncbn.convert_sync_batchnorm(Plain())
    seen: list[Tensor] = []
    for module in (model.bn, model.body):
        module.register_forward_hook(lambda module, args, y: seen.append(y))
    assert syncbn.fuse(model).fused == {"other": "relu"}
    model(torch.randn(4, 3))
    assert all(y.min() < 0 for y in seen)


def test_second_fuse_changes_nothing() -> None:
    model = syncbn.convert_sync_batchnorm(Plain())
    first = syncbn.fuse(model)
    second = syncbn.fuse(model)
    assert second.fused == {}
    assert second.skipped == {"": "it is already fused"}
    second.undo()
    assert model.bn.activation == "relu"
    first.undo()
    assert type(model) is Plain


def test_equal_modules_share_a_class() -> None:
    model = syncbn.convert_sync_batchnorm(nn.Sequential(Plain(), Plain(), Methods(), Plain()))
    model.get_submodule("3.bn").register_forward_hook(lambda *_: None)
    syncbn.fuse(model)
    first, second, other, hooked = map(type, model)
    assert first is second
    assert len({first, other, hooked}) == 3


def test_fused_model_cannot_be_reverted_or_pickled() -> None:
    model = syncbn.convert_sync_batchnorm(Plain())
    fusion = syncbn.fuse(model)
    with pytest.raises(ValueError, match=r"bn: got a layer with activation='relu'.*undo"):
        syncbn.revert_sync_batchnorm(model)
    with pytest.raises(TypeError, match=r"got a FusedPlain to pickle.*undo"):
        pickle.dumps(model)
    fusion.undo()
    assert type(pickle.loads(pickle.dumps(syncbn.revert_sync_batchnorm(model)))) is Plain


def test_undo_rejects_a_class_changed_later() -> None:
    model = syncbn.convert_sync_batchnorm(Plain())
    fusion = syncbn.fuse(model)
    fused = type(model)
    model.scale = nn.Parameter(torch.ones(2, 2))
    parametrizations.orthogonal(model, "scale")
    with pytest.raises(RuntimeError, match=r"expected a FusedPlain, the class set by syncbn\.fuse"):
        fusion.undo()
    assert model.bn.activation == "relu"
    torch.nn.utils.parametrize.remove_parametrizations(model, "scale")
    assert type(model) is fused
    fusion.undo()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch, when it compiles
def test_compile_and_double_backward() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    plain = syncbn.convert_sync_batchnorm(Residuals()).double()
    fused = copy.deepcopy(plain)
    syncbn.fuse(fused)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x))
    found, wanted = (
        torch.autograd.grad(
            torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0].square().sum(), x
        )
        for model in (fused, plain)
    )
    torch.testing.assert_close(found, wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("sharded", [False, True])
def test_synchronized_over_ranks(three_ranks: Ranks, sharded: bool) -> None:
    fused, plain = (three_ranks.run(train_on_rank, fused, sharded) for fused in (True, False))
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)


def test_undo_restores_the_slope() -> None:
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.LeakyReLU(0.3)))
    fusion = syncbn.fuse(model)
    assert model[0].negative_slope == 0.3
    fusion.undo()
    assert model[0].negative_slope == 0.01
