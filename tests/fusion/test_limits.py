"""Forwards that a trace cannot record, classes, copies, and ranks that fuse different layers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import syncbn
from tests.fusion.models import (
    BranchesOnMode,
    BranchesOnValue,
    Net,
    OptionalArgument,
    Plain,
    VariadicArguments,
)
from tests.ranks import Ranks

pytestmark = pytest.mark.layers


class NegatedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -dy


class CustomFunction(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(NegatedGradient.apply(x)))


class GradModeContext(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = self.other(x)
        return F.relu(self.bn(x))


class Decorated(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x))


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(checkpoint(self.bn, x, use_reentrant=False))


class WritesNumber(Net):
    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return F.relu(self.bn(x))


class SideEffectInHelper(Net):
    def forward(self, x: Tensor) -> Any:
        return self._all(x)

    def _all(self, x: Tensor) -> Any:
        y = F.relu(self.bn(x))
        print(len(y))
        return y


class CreatesTensor(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) + torch.rand(3)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (CustomFunction, "NegatedGradient.apply"),
        (GradModeContext, "with torch.no_grad():"),
        (Decorated, "its forward is decorated"),
        (Checkpointed, "checkpoint"),
        (WritesNumber, "self.calls"),
        (SideEffectInHelper, "its _all has 'print(len(y))'"),
        (CreatesTensor, "torch.rand"),
        (BranchesOnMode, "its forward has 'self.training', which torch.fx may not record"),
        (BranchesOnValue, "its forward has 'x.sum() > 0'"),
        (OptionalArgument, "its forward takes twice"),
        (VariadicArguments, "its forward takes *x"),
        (lambda: torch.fx.symbolic_trace(Plain()), "it has its own __deepcopy__"),
    ],
)
def test_incomplete_traces_are_skipped(model: Callable[[], nn.Module], reason: str) -> None:
    whole = syncbn.convert_sync_batchnorm(nn.Sequential(model()))
    before = [dict(vars(module)) for module in whole.modules()]
    fusion = syncbn.fuse(whole)
    assert fusion.fused == {}
    assert reason in fusion.skipped["0"]
    assert [vars(module) for module in whole.modules()] == before


class NoSubclasses(Plain):
    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses")


def test_model_is_unchanged_after_an_error() -> None:
    model = syncbn.convert_sync_batchnorm(nn.Sequential(NoSubclasses(), Plain()))
    kinds = [*map(type, model.modules())]
    with pytest.raises(TypeError, match="no subclasses"):
        syncbn.fuse(model)
    assert [*map(type, model.modules())] == kinds
    assert all(getattr(module, "activation", None) is None for module in model.modules())


def test_parametrized_modules_are_skipped() -> None:
    model = syncbn.convert_sync_batchnorm(Plain())
    model.matrix = nn.Parameter(torch.ones(2, 2))
    parametrizations.orthogonal(model, "matrix")
    assert syncbn.fuse(model).skipped == {"": "it is parametrized"}
    parametrize.remove_parametrizations(model, "matrix")


class Uncopyable(Plain):
    """Module with an attribute that cannot be copied, left out by `__getstate__`."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}


def test_deepcopy_uses_getstate() -> None:
    model = syncbn.convert_sync_batchnorm(Uncopyable())
    fusion = syncbn.fuse(model)
    clone = copy.deepcopy(model)
    assert not hasattr(clone, "lock")
    assert type(clone) is type(model)
    x = torch.randn(4, 3)
    torch.testing.assert_close(clone(x), model(x))
    fusion.undo()


class TwoSummands(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        return F.relu(y + self.other(x * 2))


def _run_with_a_hook_on_rank_0(rank: int, hooked: str | None) -> Tensor:
    torch.manual_seed(0)
    model: Any = syncbn.convert_sync_batchnorm(TwoSummands())
    if rank == 0 and hooked is not None:
        getattr(model, hooked).register_forward_hook(lambda *_: None)
    syncbn.fuse(model)
    generator = torch.Generator().manual_seed(rank)
    y: Tensor = model(torch.randn(4, 3, generator=generator))
    y.square().sum().backward()
    return torch.cat([y.detach().flatten(), model.bn.running_mean, model.other.running_mean])


@pytest.mark.parametrize("hooked", ["bn", "other"])
def test_ranks_may_fuse_different_layers(two_ranks: Ranks, hooked: str) -> None:
    """Regression: different layers of two ranks met in one all-reduce."""
    wanted = two_ranks.run(_run_with_a_hook_on_rank_0, None)
    torch.testing.assert_close(two_ranks.run(_run_with_a_hook_on_rank_0, hooked), wanted)
