"""A checkpoint of the example, recalibrated by the command in the head of its config."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from config import Arch, ModelConfig
from hydra import compose, initialize_config_dir
from resnet import build_resnet

from syncbn.cli import config_path
from tests.processes import run
from tests.transports import ROOT

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FEW = "data.test_fraction=0.95"  # 89 images to calibrate with


def test_a_checkpoint_of_the_example(tmp_path: Path) -> None:
    model = ModelConfig(Arch.resnet20, width=4, zero_init_residual=False, weights=None)
    net = build_resnet(model, channels=1, num_classes=10, seed=3)
    torch.save({"step": 5, "model": net.state_dict()}, tmp_path / "last.pt")
    files = [f"checkpoint={tmp_path / 'last.pt'}", f"output={tmp_path / 'out.pt'}"]
    settings = ["data.batch_size=1", "evaluate=true", "model.width=4", FEW]
    program = [sys.executable, *TORCHRUN, "-m", "syncbn.cli.recalibrate", "+example=resnet"]
    done = run([*program, *files, *settings], ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ bn1 +89 ", done.stdout, re.MULTILINE)
    assert "cross-entropy" in done.stdout
    old, new = (torch.load(tmp_path / name, weights_only=True) for name in ("last.pt", "out.pt"))
    assert new["step"] == 5
    changed = [n for n, v in old["model"].items() if not torch.equal(v, new["model"][n])]
    assert len(changed) == 2 * 19
    assert all(name.endswith(("running_mean", "running_var")) for name in changed)


@pytest.mark.parametrize("data", ["digits", "cifar10", "imagefolder"])
def test_every_data_set_composes(data: str) -> None:
    folder = [] if data == "digits" else ["data.root=FOLDER"]
    with initialize_config_dir(config_dir=config_path(), version_base="1.3"):
        cfg = compose("recalibrate", ["+example=resnet", f"data={data}", "model=resnet50", *folder])
    assert cfg.data.source == data
    assert (cfg.model.name, cfg.model.data.source) == ("resnet50", data)
    assert not cfg.data.augment
