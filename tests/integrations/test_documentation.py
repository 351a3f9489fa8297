"""The code of docs/trainers.md, run on two ranks with the real packages."""

from __future__ import annotations

import re
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import syncbn
from tests.integrations import test_gan, test_lightning, test_transformers
from tests.integrations.forked import run_on_two_ranks
from tests.integrations.support import BATCH, PointNet, initialize, make_dataset

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainers.md"
#: Python code of each section.
CODE = {
    section.splitlines()[0]: "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    for section in _PAGE.read_text().split("\n## ")[1:]
}
#: Packages of each section; tests/ultralytics_recipe.py runs the one of ultralytics.
PACKAGES = {
    "Lightning": "lightning.pytorch",
    "transformers": "transformers.trainer",
    "Accelerate": "accelerate",
    "MONAI": "monai.networks.nets",
    "Two forwards before a backward": "torch",
}


def _lightning() -> dict[str, Any]:
    lightning: Any = import_module("lightning")
    lightning.Trainer = partial(
        lightning.Trainer, accelerator="cpu", devices=2, max_epochs=1, logger=False
    )
    loader = DataLoader(make_dataset(3, 6), BATCH)
    module = test_lightning.make_module("lightning.pytorch")
    return {"module": module, "train_loader": loader, "val_loader": loader}


def _transformers() -> dict[str, Any]:
    package: Any = import_module("transformers")
    package.TrainingArguments = partial(
        package.TrainingArguments,
        use_cpu=True,
        num_train_epochs=1,
        report_to="none",
        disable_tqdm=True,
    )
    model = initialize(test_transformers.make_resnet)
    return {"model": model, "images": test_transformers.Records()}


def _accelerate() -> dict[str, Any]:
    package: Any = import_module("accelerate")
    package.Accelerator = partial(package.Accelerator, cpu=True)
    net = initialize(PointNet)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    return {
        "model": net,
        "optimizer": optimizer,
        "loader": DataLoader(make_dataset(3, 6), BATCH),
        "F": F,
    }


def _gan() -> dict[str, Any]:
    makers = test_gan.make_generator, test_gan.make_discriminator
    nets = [syncbn.convert_sync_batchnorm(initialize(make)) for make in makers]
    generator, discriminator = (DistributedDataParallel(net) for net in nets)
    return {
        "generator": generator,
        "discriminator": discriminator,
        "hinge": test_gan.hinge,
        "noise": torch.randn(4, 4).double(),
        "real": torch.randn(4, 3, 4).double(),
    }


_NAMES = {
    "Lightning": _lightning,
    "transformers": _transformers,
    "Accelerate": _accelerate,
    "Two forwards before a backward": _gan,
}


def _run(rank: int, section: str) -> dict[str, bool]:
    """Return whether each network of the code has synchronized layers at its end."""
    names: dict[str, Any] = {"__name__": section, **_NAMES.get(section, dict)()}
    exec(compile(CODE[section], f"{_PAGE}: {section}", "exec"), names)
    if section == "Lightning":
        assert names["trainer"].callbacks[1].report is not None
    if section == "Accelerate":
        assert isinstance(names["model"], DistributedDataParallel)
    if section == "transformers":
        assert isinstance(names["trainer"].model_wrapped, DistributedDataParallel)
        callbacks = names["trainer"].callback_handler.callbacks
        assert [c.report is not None for c in callbacks if hasattr(c, "report")] == [True]
    return {
        name: any(isinstance(layer, syncbn.SyncBatchNorm) for layer in value.modules())
        for name, value in names.items()
        if isinstance(value, nn.Module)
    }


@pytest.mark.parametrize("section", sorted(CODE.keys() - {"ultralytics"}))
def test_code(section: str, tmp_path: Path) -> None:
    import_module(PACKAGES[section])
    for answer in run_on_two_ranks(_run, tmp_path, section):
        if section == "Lightning":  # reverted
            assert answer == {"module": False}
        else:
            assert answer
            assert all(answer.values()), answer
