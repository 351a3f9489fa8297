"""Selection of layers by training mode, name and module."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from syncbn.inference import example_weighted
from tests.calibration.networks import (
    EXACT,
    FROZEN,
    METHODS,
    Model,
    Stats,
    compute_population_stats,
    distance,
    images,
    layers,
    network,
    partly_frozen,
    require_error,
    run_batch,
    statistics,
)


class Affine(nn.Module):
    """Affine map of a frozen layer, which no calibration can change."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = [norm]  # no submodule

    def forward(self, x: Tensor) -> Any:
        norm = self.norm[0]
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        bias = norm.bias - norm.running_mean * scale
        return x * scale[:, None, None] + bias[:, None, None]


def with_affine_layers() -> nn.Sequential:
    net = network()
    for name in FROZEN:
        parent, _, last = name.rpartition(".")
        net.get_submodule(parent)._modules[last] = Affine(layers(net)[name])
    return net


def only(names: Any, stats: Stats) -> Stats:
    return {name: pair for name, pair in stats.items() if name in names}


@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_are_left_alone(method: Any) -> None:
    """A fine-tuned model lost the statistics of its frozen backbone."""
    net, reference, batches = partly_frozen(), with_affine_layers(), images().split(4)
    before, modes = statistics(net), [module.training for module in net.modules()]
    if method in EXACT:
        compute_population_stats(reference, images())
    else:
        syncbn.recalibrate(reference, batches, method=method)
    report = syncbn.recalibrate(net, batches, method=method)
    expected = {**statistics(reference), **only(FROZEN, before)}
    assert distance(statistics(net), expected) < 1e-12
    assert distance(only(FROZEN, statistics(net)), only(FROZEN, before)) == 0.0
    assert report.left_alone == list(FROZEN)
    assert [layer.name for layer in report.layers] == ["3.first.1", "6", "11"]
    assert [module.training for module in net.modules()] == modes
    report.undo()
    assert distance(statistics(net), before) == 0.0


CHOICES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a layer": ({"layers": "6"}, ["6"]),
    "a module above": ({"layers": "3"}, ["3.first.1", "3.second.1"]),
    "a list": ({"layers": ["11", "3.first"]}, ["3.first.1", "11"]),
    "all but": ({"skip": "3"}, ["1", "6", "11"]),
    "both": ({"layers": ["3", "6"], "skip": ["3.second"]}, ["3.first.1", "6"]),
    "the root": ({"layers": ""}, ["1", "3.first.1", "3.second.1", "6", "11"]),
    "none to skip": ({"skip": []}, ["1", "3.first.1", "3.second.1", "6", "11"]),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_select_by_name(choice: str) -> None:
    """In a model whose layers are all in the same mode, the default is every layer."""
    arguments, chosen = CHOICES[choice]
    net = network().train("layers" in arguments)
    before = statistics(net)
    model: Any = torch.compile(net, backend="eager") if choice == "both" else net
    report = syncbn.recalibrate(model, images().split(4), **arguments)
    assert [layer.name for layer in report.layers] == chosen
    assert report.left_alone == [name for name in before if name not in chosen]
    after = statistics(net)
    changed = [name for name in before if distance(only([name], before), only([name], after)) > 0.0]
    assert changed == chosen


@pytest.mark.parametrize("by_module", [False, True])
def test_names_and_modules_override_frozen_mode(by_module: bool) -> None:
    net: Any = partly_frozen()
    layers = [net[1], net[3]] if by_module else ["1", "3"]
    skip = net[3].first if by_module else "3.first"
    report = syncbn.recalibrate(net, images().split(4), layers=layers, skip=skip)
    assert [layer.name for layer in report.layers] == ["1", "3.second.1"]
    report = syncbn.recalibrate(partly_frozen(), images().split(4), skip="11")
    assert [layer.name for layer in report.layers] == ["3.first.1", "6"]


def test_shared_module_has_all_names() -> None:
    shared, other = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    net = Model(lambda net, x: net.teacher(x), student=shared, teacher=shared, other=other)
    report = syncbn.recalibrate(net, images().split(4), layers="teacher")
    assert [layer.name for layer in report.layers] == ["student"]
    assert report.left_alone == ["other"]


class Unread:
    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("read before the names were checked")


NAMES = "'1', '3.first.1', '3.second.1', '6', '11'"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such module": ({"layers": "backbone"}, rf"layers: got 'backbone'.* above them: {NAMES}"),
    "part of a name": ({"skip": ["3.fir"]}, r"skip: got '3\.fir', which is no module"),
    "no batch norm in it": ({"skip": ["6", "0"]}, r"skip: got '0', which is no module of the"),
    "another model": ({"layers": nn.BatchNorm2d(3)}, r"layers: got a BatchNorm2d, which is no"),
    "a number": ({"layers": 6}, r"layers: got 6 of type int; expected the name of a module"),
    "nothing": ({"layers": []}, r"all 5 batch-norm layers are left alone; expected one"),
    "all": ({"skip": ""}, r"all 5 batch-norm layers are left alone"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_names(case: str) -> None:
    arguments, message = BAD[case]
    require_error(network(), message, Unread(), **arguments)


@pytest.mark.parametrize("method", EXACT)
def test_skip_layer_without_statistics(method: Any) -> None:
    """The layer uses the statistics of each batch, in inference as in training."""
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    net = nn.Sequential(untracked, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    parts = images().split(4)
    with pytest.raises(ValueError, match=r"0: got a layer with track_running_stats=False"):
        syncbn.recalibrate(net, parts, layers=["0", "2"])
    report = syncbn.recalibrate(net, parts, method=method, skip="0", forward=run_batch)
    assert report.left_alone == ["0"]
    normalized = [F.batch_norm(x, None, None, training=True) for x in parts]
    inputs = torch.cat([net[1](x) for x in normalized]).transpose(0, 1).flatten(1).detach()
    torch.testing.assert_close(net[2].running_mean, inputs.mean(1))
    torch.testing.assert_close(net[2].running_var, inputs.var(1))


def test_report_of_frozen_layers(tmp_path: Path) -> None:
    net = partly_frozen()
    report = syncbn.recalibrate(net, images().split(4))
    shown = "left alone (frozen in evaluation mode, or excluded by layers= or skip=): 1, 3.second.1"
    assert shown in " ".join(report.table().split())
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["left_alone"] == list(FROZEN)
    with example_weighted(net, 4, report):
        weighted = [n for n, x in layers(net).items() if "EvalStatistics" in type(x).__name__]
    assert weighted == ["3.first.1", "6", "11"]


@pytest.mark.parametrize(
    ("one", "other", "skip"),
    [
        ("3.first.1.running_mean", "3.second.1.running_mean", None),
        ("6.running_mean", "6.running_var", None),
        ("3.second.1.running_var", "1.running_var", "1"),
    ],
    ids=["two layers", "mean and variance", "a skipped layer"],
)
def test_shared_buffers(one: str, other: str, skip: str | None) -> None:
    """A shared buffer kept the statistics of one layer."""
    net = network()
    layer, _, name = one.rpartition(".")
    setattr(net.get_submodule(layer), name, net.get_buffer(other))
    require_error(net, f"{one} and {other} share memory", Unread(), skip=skip)


def test_overlapping_buffers() -> None:
    net, storage = network(), torch.ones(10).double()
    layers(net)["1"].running_var, layers(net)["6"].running_mean = storage[:6], storage[5:]
    require_error(net, r"1\.running_var and 6\.running_mean share memory", Unread())


def test_integer_buffers() -> None:
    """Integer buffers lost the fractions."""
    net = network()
    layers(net)["6"].running_var = layers(net)["6"].running_var.long()
    message = r"6: got running statistics of dtype torch\.int64, which cannot hold a fraction"
    require_error(net, message, Unread())


def test_interleaved_buffers() -> None:
    net: Any = network()
    table = torch.ones(6, 4).double()
    norms = net[3].first[1], net[3].second[1]
    for norm, (mean, var) in zip(norms, table.T.split(2), strict=True):
        norm.running_mean, norm.running_var = mean, var
    syncbn.recalibrate(net, images().split(4))
    assert distance(statistics(net), compute_population_stats(network(), images())) < 1e-12
