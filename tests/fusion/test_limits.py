"""What fusing must not lose: all that torch.fx does not see, on one rank and between ranks."""

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
from tests.fusion.checks import check_fused
from tests.fusion.models import Net, Plain
from tests.ranks import Ranks


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -dy


class WithAFunctionOfItsOwn(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(Reversed.apply(x)))


class InAContext(Net):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = self.other(x)
        return F.relu(self.bn(x))


class Decorated(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x))


class Recomputed(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(checkpoint(self.bn, x, use_reentrant=False))


class WithANumber(Net):
    alpha = 2.0

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) * self.alpha


class Counting(Net):
    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return F.relu(self.bn(x))


class ByType(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) if isinstance(x, Tensor) else x


class WithAHelper(Net):
    def forward(self, x: Tensor) -> Any:
        return self._all(x)

    def _all(self, x: Tensor) -> Any:
        y = F.relu(self.bn(x))
        print(len(y))
        return y


class WithNewTensors(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) + torch.rand(3)


@pytest.mark.parametrize(
    ("model", "lost"),
    [
        (WithAFunctionOfItsOwn, "Reversed.apply"),
        (InAContext, "with torch.no_grad():"),
        (Decorated, "its forward is decorated"),
        (Recomputed, "checkpoint"),
        (WithANumber, "self.alpha"),
        (Counting, "self.calls"),
        (ByType, "isinstance(x, Tensor)"),
        (WithAHelper, "its _all has 'print(len(y))'"),
        (WithNewTensors, "torch.rand"),
    ],
)
def test_what_is_not_all_of_a_forward_is_left_alone(
    model: Callable[[], nn.Module], lost: str
) -> None:
    net = syncbn.convert_sync_batchnorm(model())
    before = dict(vars(net))
    fusion = syncbn.fuse(net)
    assert fusion.fused == {}
    assert lost in fusion.skipped[""]
    assert vars(net) == before


class Torchvision(Net):
    """As its blocks are written: by a helper, with a child that may be None."""

    def __init__(self, with_downsample: bool) -> None:
        super().__init__()
        self.downsample = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        if not with_downsample:
            self.downsample = None  # type: ignore[assignment]
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        """Map ``[N, 3]`` to itself."""
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Any:
        identity = x
        out: Tensor = self.bn(x)
        out = self.relu(out)
        out = self.other(torch.flatten(out, 1))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out * self.scale


@pytest.mark.parametrize(("with_downsample", "last"), [(False, "other"), (True, "downsample.1")])
def test_blocks_as_torchvision_writes_them(with_downsample: bool, last: str) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    found = check_fused(Torchvision(with_downsample), x)
    assert found == {"bn": "relu", last: "residual, relu"}


class BranchThatWrites(Net):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.shortcut = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        x = x * 1
        y = self.branch(x)
        return F.relu(y + self.shortcut(x))


class Broadcasting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(1, 3))

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x) + self.offset)


@pytest.mark.parametrize(
    ("model", "wanted"), [(BranchThatWrites, {}), (Broadcasting, {"bn": "residual, relu"})]
)
def test_results_stay(model: Callable[[], nn.Module], wanted: dict[str, str]) -> None:
    assert check_fused(model(), torch.randn(5, 3, dtype=torch.float64)) == wanted


class Final(Plain):
    def __init_subclass__(cls) -> None:
        raise TypeError("nothing may be derived from this class")


def test_an_error_changes_nothing() -> None:
    model = syncbn.convert_sync_batchnorm(nn.Sequential(Final(), Plain()))
    kinds = [*map(type, model.modules())]
    with pytest.raises(TypeError, match="nothing may be derived"):
        syncbn.fuse(model)
    assert [*map(type, model.modules())] == kinds
    assert all(getattr(module, "activation", None) is None for module in model.modules())


def test_parametrized_modules_are_left_alone() -> None:
    model = syncbn.convert_sync_batchnorm(Plain())
    model.matrix = nn.Parameter(torch.ones(2, 2))
    parametrizations.orthogonal(model, "matrix")
    assert syncbn.fuse(model).skipped == {"": "it is parametrized"}
    parametrize.remove_parametrizations(model, "matrix")


class Locked(Plain):
    """Has what cannot be copied, and says what to copy."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}


def test_copies_ask_the_module_what_to_copy() -> None:
    model = syncbn.convert_sync_batchnorm(Locked())
    fusion = syncbn.fuse(model)
    clone = copy.deepcopy(model)
    assert not hasattr(clone, "lock")
    assert type(clone) is type(model)
    x = torch.randn(4, 3)
    torch.testing.assert_close(clone(x), model(x))
    fusion.undo()


class TwoLayersInTurn(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        return F.relu(y + self.other(x * 2))


def _with_a_hook_on_some(rank: int, hooked: str | None) -> Tensor:
    torch.manual_seed(0)
    model: Any = syncbn.convert_sync_batchnorm(TwoLayersInTurn())
    if rank == 0 and hooked is not None:
        getattr(model, hooked).register_forward_hook(lambda *_: None)
    syncbn.fuse(model)
    generator = torch.Generator().manual_seed(rank)
    y: Tensor = model(torch.randn(4, 3, generator=generator))
    y.square().sum().backward()
    return torch.cat([y.detach().flatten(), model.bn.running_mean, model.other.running_mean])


@pytest.mark.parametrize("hooked", ["bn", "other"])
def test_ranks_may_fuse_what_others_do_not(two_ranks: Ranks, hooked: str) -> None:
    """Their layers met in one message, and were added up."""
    wanted = two_ranks.run(_with_a_hook_on_some, None)
    torch.testing.assert_close(two_ranks.run(_with_a_hook_on_some, hooked), wanted)
