"""ReLUs and residuals moved into the layers before them: the same numbers, and the way back."""

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
from tests.fusion.checks import check_fused, train_on_a_rank
from tests.fusion.models import (
    AddsToTheOther,
    ByMode,
    ByValue,
    CalledFromAbove,
    CalledTwice,
    Doubled,
    Given,
    GivenInside,
    InPlace,
    KeywordArguments,
    Methods,
    Optional,
    Parent,
    Plain,
    Registered,
    Residuals,
    ReturnsTwo,
    Scaled,
    TwoLayers,
    UsedTwice,
    Variadic,
    WritesBetween,
    WritesByFunction,
    WritesByOperator,
)
from tests.nn.test_third_party import network
from tests.ranks import Ranks


@pytest.mark.parametrize(
    ("build", "size", "residuals", "alone"),
    [
        pytest.param(resnet20, 8, 9, 10, id="resnet20"),
        pytest.param(resnet50, 32, 16, 33, id="resnet50"),
        pytest.param(network, 32, 5, 11, id="transformers"),
    ],
)
def test_networks(build: Callable[[], nn.Module], size: int, residuals: int, alone: int) -> None:
    fused = check_fused(build(), torch.randn(3, 3, size, size, dtype=torch.float64))
    kinds = list(fused.values())
    assert (kinds.count("residual, relu"), kinds.count("relu")) == (residuals, alone)
    names = [name for name, _ in build().named_modules() if name in fused]
    assert list(fused) == names


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (Plain, {"bn": "relu", "other": "relu", "body.1": "relu"}),
        (Methods, {"bn": "relu", "other": "relu"}),
        (Residuals, {"bn": "residual, relu", "other": "residual, relu"}),
        (InPlace, {"deep.1.1": "residual, relu"}),
        (TwoLayers, {"deep.1.1": "residual, relu"}),
        (
            Parent,
            {
                "block.deep.1.1": "residual, relu",
                "others.0.deep.1.1": "relu",
                **{f"others.1.{name}": "relu" for name in ("bn", "other", "body.1")},
            },
        ),
        (KeywordArguments, {"bn": "residual, relu"}),
    ],
)
def test_patterns(model: Callable[[], nn.Module], wanted: dict[str, str]) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    assert check_fused(model(), x) == wanted


@pytest.mark.parametrize(
    "model",
    [
        *(CalledTwice, UsedTwice, CalledFromAbove, Registered, AddsToTheOther, Doubled, Scaled),
        *(ReturnsTwo, Given, GivenInside),
    ],
)
def test_what_could_change_is_left_alone(model: Callable[[], nn.Module]) -> None:
    assert check_fused(model(), torch.randn(5, 3, dtype=torch.float64)) == {}


@pytest.mark.parametrize("build", [WritesBetween, WritesByOperator, WritesByFunction])
def test_layers_are_not_moved_behind_what_writes(build: Callable[[], nn.Module]) -> None:
    model = syncbn.convert_sync_batchnorm(build()).eval()
    x = torch.randn(5, 3)
    wanted = model(x)
    assert syncbn.fuse(model).fused == {}
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ByMode, "its forward has 'self.training', which torch.fx may not record"),
        (ByValue, "its forward has 'x.sum() > 0'"),
        (Optional, "its forward has an optional argument, twice"),
        (Variadic, "its forward takes *x"),
    ],
)
def test_what_cannot_be_read_is_said(model: Callable[[], nn.Module], reason: str) -> None:
    whole = syncbn.convert_sync_batchnorm(nn.Sequential(model()))
    fusion = syncbn.fuse(whole)
    assert fusion.fused == {}
    assert fusion.skipped["0"].startswith(reason)
    assert whole.training
    assert whole[0].training


def test_a_forward_of_an_instance_is_left_alone() -> None:
    model: Any = syncbn.convert_sync_batchnorm(Methods())
    other: Any = copy.deepcopy(model)
    model.forward = lambda x: x
    assert syncbn.fuse(model).skipped == {"": "its forward is an attribute of the instance"}
    other.bn.forward = lambda x: x
    assert syncbn.fuse(other).fused == {"other": "relu"}


def test_hooks_see_what_they_saw() -> None:
    model = syncbn.convert_sync_batchnorm(Plain())
    seen: list[Tensor] = []
    for module in (model.bn, model.body):
        module.register_forward_hook(lambda module, args, y: seen.append(y))
    assert syncbn.fuse(model).fused == {"other": "relu"}
    model(torch.randn(4, 3))
    assert all(y.min() < 0 for y in seen)


def test_a_fused_module_is_left_alone() -> None:
    model = syncbn.convert_sync_batchnorm(Plain())
    first = syncbn.fuse(model)
    second = syncbn.fuse(model)
    assert second.fused == {}
    assert second.skipped == {"": "it is already fused"}
    second.undo()
    assert model.bn.activation == "relu"
    first.undo()
    assert type(model) is Plain


def test_equal_modules_stay_of_one_class() -> None:
    model = syncbn.convert_sync_batchnorm(nn.Sequential(Plain(), Plain(), Methods(), Plain()))
    model.get_submodule("3.bn").register_forward_hook(lambda *_: None)
    syncbn.fuse(model)
    first, second, other, hooked = map(type, model)
    assert first is second
    assert len({first, other, hooked}) == 3


def test_is_not_reverted_or_pickled() -> None:
    model = syncbn.convert_sync_batchnorm(Plain())
    fusion = syncbn.fuse(model)
    with pytest.raises(ValueError, match=r"bn: got a layer with activation='relu'.*undo"):
        syncbn.revert_sync_batchnorm(model)
    with pytest.raises(TypeError, match=r"got a FusedPlain to pickle.*undo"):
        pickle.dumps(model)
    fusion.undo()
    assert type(pickle.loads(pickle.dumps(syncbn.revert_sync_batchnorm(model)))) is Plain


def test_undo_refuses_a_class_changed_since() -> None:
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
def test_compiles_and_differentiates_twice() -> None:
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
def test_over_ranks(ranks: Ranks, sharded: bool) -> None:
    torch.testing.assert_close(
        ranks.run(train_on_a_rank, True, sharded),
        ranks.run(train_on_a_rank, False, sharded),
        rtol=1e-9,
        atol=1e-12,
    )
