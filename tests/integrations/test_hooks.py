"""Errors of unsupported trainers and arguments, and loaders in the middle of an epoch."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import syncbn
from syncbn.integrations.hooks import import_hook
from syncbn.integrations.recalibration import Recalibration, separate_loader

NUMBERS: Any = list(range(6))


class _OldCallback:
    on_validation_start = on_test_start = None


def _make_old_lightning() -> dict[str, ModuleType]:
    """Return modules of a version without hooks of epochs, and without LayerSync."""
    package, plugins = ModuleType("pytorch_lightning"), ModuleType("pytorch_lightning.plugins")
    package.__dict__["Callback"] = _OldCallback
    return {"pytorch_lightning": package, "pytorch_lightning.plugins": plugins}


@pytest.fixture
def old_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in ("lightning", "pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "syncbn.integrations.lightning", raising=False)
    for name, module in _make_old_lightning().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("old_lightning")
def test_lightning_without_layer_sync() -> None:
    message = (
        r"got pytorch-lightning .* without pytorch_lightning\.plugins\.LayerSync; expected "
        r"pytorch-lightning>=2\.0: pip install -U"
    )
    with pytest.raises(ImportError, match=message):
        import_module("syncbn.integrations.lightning")


@pytest.mark.usefixtures("old_lightning")
def test_lightning_without_a_hook() -> None:
    with pytest.raises(ImportError, match=r"without pytorch_lightning\.Callback\.on_test_epoch"):
        import_hook("a>=1", "pytorch_lightning", "Callback", "on_test_start", "on_test_epoch_start")


def test_missing_package() -> None:
    with pytest.raises(
        ImportError, match=r"got no-trainer \(not installed\) without no_trainer\.A"
    ):
        import_hook("no-trainer>=1", "no_trainer", "A")


def test_unknown_options_fail_before_training() -> None:
    callback = import_module("syncbn.integrations.transformers").RecalibrationCallback
    with pytest.raises(TypeError, match="num_batches"):
        callback(num_batches=3)


@pytest.mark.parametrize("loader", [None, {"a": [], "b": []}])
def test_trainer_without_one_loader(loader: Any) -> None:
    with pytest.raises(
        ValueError, match=r"expected one loader, or RecalibrationCallback\(batches="
    ):
        Recalibration(None, {}).run(nn.BatchNorm1d(3), loader)


def test_batches_in_inference_mode() -> None:
    """Lightning evaluates in inference mode; training continues with the statistics."""
    layer = nn.BatchNorm1d(3)
    with torch.inference_mode():
        Recalibration([torch.ones(2, 3), torch.zeros(2, 3)], {}).run(layer, None)
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 0.5))
    layer(torch.ones(2, 3)).sum().backward()
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 0.55))


def test_plugin_leaves_synchronized_layers_alone() -> None:
    plugin = import_module("syncbn.integrations.lightning").SyncBatchNormPlugin()
    net = nn.Sequential(nn.BatchNorm1d(3), syncbn.SyncBatchNorm1d(3))
    kinds = [type(layer) for layer in net]
    plugin.revert(plugin.apply(net))
    assert [type(layer) for layer in net] == kinds


def test_loader_in_the_middle_of_an_epoch() -> None:
    """A loader with persistent workers has one iterator: iterating it again restarts it."""
    loader: Any = DataLoader(NUMBERS, 1, num_workers=1, persistent_workers=True)
    epoch = iter(loader)
    batches: list[Tensor] = [next(epoch)]
    assert torch.cat(list(separate_loader(loader))).tolist() == NUMBERS
    batches += epoch
    assert torch.cat(batches).tolist() == NUMBERS


def test_accelerate_loader_in_the_middle_of_an_epoch() -> None:
    """Iterating a prepared loader would mark the end of the epoch for gradient accumulation."""
    accelerator = import_module("accelerate").Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(NUMBERS, 2))
    ends = []
    for _ in loader:
        assert len(list(separate_loader(loader))) == 3
        ends.append(accelerator.gradient_state.end_of_dataloader)
    assert ends == [False, False, True]
    assert loader.iteration == 1
