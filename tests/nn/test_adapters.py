"""Batch-norm layers with additional operations: known classes, and user adapters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.device import seeded
from tests.nn import stand_ins
from tests.ranks import Ranks

pytestmark = pytest.mark.layers


class Scaled(nn.BatchNorm2d):
    """A user's class: batch norm, a scale, and an option of its forward."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.factor = 2.0

    def forward(self, input: Tensor, sign: float = 1.0) -> Tensor:
        return super().forward(input) * self.factor * sign


def adapt_scaled(layer: Any, normalize: Any, x: Tensor, sign: float = 1.0) -> Tensor:
    y: Tensor = normalize(x) * layer.factor * sign
    return y


ADAPTERS: Any = {Scaled: adapt_scaled}
LAYERS: dict[str, Callable[[], Any]] = {
    "apex": lambda: stand_ins.ApexSyncBatchNorm(3),
    "detectron2": lambda: stand_ins.NaiveSyncBatchNorm(3),
    "fairscale": lambda: stand_ins.FairscaleSyncBatchNorm(3),
    "horovod": lambda: stand_ins.HorovodSyncBatchNorm(3),
    "inplace_abn": lambda: stand_ins.InPlaceABN(3),
    "inplace_abn elu": lambda: stand_ins.InPlaceABN(3, "elu", 1.0),
    "inplace_abn identity": lambda: stand_ins.InPlaceABN(3, "identity"),
    "mmcv": lambda: stand_ins.MmcvSyncBatchNorm(3),
    "own": lambda: Scaled(3),
}


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), LAYERS[name]()).double()


def make_batch() -> Tensor:
    return torch.randn(7, 2, 4, 5, dtype=torch.float64, generator=seeded(0))


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return outputs in training and evaluation, gradients and buffers."""
    x = x.clone().requires_grad_()
    y = model.train()(x)
    gradients = torch.autograd.grad((y * y.detach().cos()).sum(), [x, *model.parameters()])
    return [y.detach(), *gradients, model.eval()(x).detach(), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("name", LAYERS)
def test_one_rank_is_unchanged(name: str) -> None:
    model, x = make_model(name), make_batch()
    plain = copy.deepcopy(model)
    attributes = {k: v for k, v in vars(model[1]).items() if not k.startswith("_")}
    assert syncbn.convert_sync_batchnorm(model, adapters=ADAPTERS) is model
    assert isinstance(model[1], syncbn.SyncBatchNorm)
    assert isinstance(model[1], type(plain[1]))
    assert model[1]._syncbn_fqn == "1"
    clones = [model, copy.deepcopy(model)]
    if name == "own":  # the modules of stand-ins cannot be imported
        clones.append(pickle.loads(pickle.dumps(model)))
    for clone in clones:
        torch.testing.assert_close(outcome(clone, x), outcome(copy.deepcopy(plain), x))
    state = copy.deepcopy(model.state_dict())
    assert state.keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())
    model.load_state_dict(state)
    syncbn.revert_sync_batchnorm(model.train())
    assert type(model[1]) is type(plain[1])
    assert {k: v for k, v in vars(model[1]).items() if not k.startswith("_")} == attributes
    plain.load_state_dict(state)
    torch.testing.assert_close(outcome(model, x), outcome(plain, x))


SIZES = (4, 0, 3)


def _train(rank: int) -> dict[str, list[Tensor]]:
    results = {}
    for name in LAYERS:
        model = syncbn.convert_sync_batchnorm(make_model(name), adapters=ADAPTERS)
        results[name] = outcome(model, make_batch().split(SIZES)[rank])
    return results


def test_ranks_equal_one_process(three_ranks: Ranks) -> None:
    answers = three_ranks.run(_train)
    for name in LAYERS:
        y, dx, *rest = outcome(make_model(name), make_batch())
        parts = [answer[name] for answer in answers]
        torch.testing.assert_close(torch.cat([p[0] for p in parts]), y)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), dx)
        shares = zip(*(p[2:6] for p in parts), strict=True)
        torch.testing.assert_close([sum(share) for share in shares], rest[:4])
        for part in parts:
            torch.testing.assert_close(part[7:], rest[5:])


def test_apex_adds_and_rectifies() -> None:
    layer = stand_ins.ApexSyncBatchNorm(3)
    layer.fuse_relu = True
    x, z = torch.randn(2, 4, 3, 5)
    expected = copy.deepcopy(layer)(x, z)
    syncbn.convert_sync_batchnorm(layer)
    torch.testing.assert_close(layer(x, z), expected)


def test_arguments_of_forward_are_passed() -> None:
    layer, x = Scaled(3), torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(layer)(x, sign=-1.0)
    syncbn.convert_sync_batchnorm(layer, adapters=ADAPTERS)
    torch.testing.assert_close(layer(x, sign=-1.0), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled() -> None:
    model, x = make_model("own"), make_batch()
    syncbn.convert_sync_batchnorm(model, adapters=ADAPTERS)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_traced_layer_is_one_call() -> None:
    model, x = make_model("own"), make_batch()
    syncbn.convert_sync_batchnorm(model, adapters=ADAPTERS)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    torch.testing.assert_close(traced(x), model(x))


class Unfit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([Scaled], r"adapters: got \[<class .*Scaled'>\]: None; expected classes of modules, "),
        ({"Scaled": adapt_scaled}, "adapters: got 'Scaled': <function adapt_scaled"),
        ({Scaled: 3}, "adapters: got <class .*Scaled'>: 3; expected"),
        ({nn.BatchNorm2d: adapt_scaled}, "expected classes of modules, other than torch's"),
        (
            {Unfit: adapt_scaled},
            "got a Unfit without num_features, eps, momentum, bias, running_mean",
        ),
    ],
)
def test_bad_adapters(adapters: Any, message: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), Unfit())
    with pytest.raises(ValueError, match=message):
        syncbn.convert_sync_batchnorm(model, adapters=adapters)
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize(("result", "got"), [(torch.ones(2), r"\(2,\)"), (None, "NoneType")])
def test_output_of_another_shape(result: Any, got: str) -> None:
    layer = Scaled(3)
    syncbn.convert_sync_batchnorm(layer, adapters={Scaled: lambda *_: result})
    with pytest.raises(ValueError, match=f"SyncScaled: got {got} from the adapter for an input of"):
        layer(torch.randn(2, 3, 4, 4))


def test_layer_without_adapter_is_left_alone() -> None:
    model = make_model("own")
    with pytest.warns(UserWarning, match="Scaled overrides forward.*Pass adapters="):
        syncbn.convert_sync_batchnorm(model)
    assert type(model[1]) is Scaled


class PointNorm(nn.Module):
    """As in torch_geometric and MinkowskiEngine: an ``nn.BatchNorm1d`` over features of points."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.BatchNorm1d(3)

    def forward(self, points: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**points, "features": self.module(points["features"])}


def _normalize_points(rank: int) -> Tensor:
    torch.manual_seed(0)
    features = torch.randn(12, 3).split((7, 1, 4))[rank]
    layer = syncbn.convert_sync_batchnorm(PointNorm())
    y: Tensor = layer({"features": features})["features"]
    return y.detach()


def test_layers_that_hold_a_batch_norm_convert_by_themselves(three_ranks: Ranks) -> None:
    torch.manual_seed(0)
    expected = PointNorm()({"features": torch.randn(12, 3)})["features"]
    torch.testing.assert_close(torch.cat(three_ranks.run(_normalize_points)), expected)


def test_frozen_batch_norm_is_left_alone_silently() -> None:
    """Stand-in: it has the tensors of a batch norm, and none of its statistics are of a batch."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.ones(3))

    model = nn.Sequential(FrozenBatchNorm2d(), nn.BatchNorm2d(3))
    syncbn.convert_sync_batchnorm(model)
    assert type(model[0]) is FrozenBatchNorm2d


def test_channels_last_layer_of_apex() -> None:
    layer = stand_ins.ApexSyncBatchNorm(3)
    layer.channel_last = True
    x = torch.randn(4, 5, 3)
    expected = copy.deepcopy(layer)(x.movedim(-1, 1)).movedim(1, -1)
    syncbn.convert_sync_batchnorm(layer)
    torch.testing.assert_close(layer(x), expected)


def test_layer_without_a_counter_prints_and_resets() -> None:
    """torch's update_bn resets the statistics."""
    model = make_model("inplace_abn")
    syncbn.convert_sync_batchnorm(model)
    assert "SyncInPlaceABN" in repr(model)
    model(make_batch())
    model[1].reset_running_stats()
    assert model[1].running_mean.tolist() == [0, 0, 0]


def _keep_group(rank: int) -> float:
    layer: Any = stand_ins.MmcvSyncBatchNorm(1)
    layer.group, _ = torch.distributed.new_subgroups_by_enumeration([[0, 1], [2]])
    layer.momentum = 1.0
    syncbn.convert_sync_batchnorm(layer)
    layer(torch.full((2, 1, 1, 1), float(rank)))
    return float(layer.running_mean)


def test_layer_keeps_its_group(three_ranks: Ranks) -> None:
    assert three_ranks.run(_keep_group) == [0.5, 0.5, 2]
