"""A checkpoint of the example, recalibrated with the settings in the head of its config."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from config import Arch, ModelConfig
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from resnet import build_resnet

import syncbn
from syncbn.cli import config_path
from syncbn.cli.recalibrate import add_to_path, run
from tests.ranks import Ranks
from tests.transports import ROOT


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir=config_path(), version_base="1.3"):
        return compose("recalibrate", ["+example=resnet", *overrides])


def recalibrated(rank: int, settings: list[str]) -> str:
    cfg = config(*settings)
    add_to_path(ROOT / cfg.path)
    info = syncbn.RankInfo(rank, dist.get_world_size(), rank, torch.device("cpu"))
    with redirect_stdout(StringIO()) as output:
        run(cfg, info)
    return output.getvalue()


def test_a_checkpoint_of_the_example(two_ranks: Ranks, tmp_path: Path) -> None:
    model = ModelConfig(Arch.resnet20, width=4, zero_init_residual=False, weights=None)
    net = build_resnet(model, channels=1, num_classes=10, seed=3)
    torch.save({"step": 5, "model": net.state_dict()}, tmp_path / "last.pt")
    files = [f"checkpoint={tmp_path / 'last.pt'}", f"output={tmp_path / 'out.pt'}"]
    few = "data.test_fraction=0.95"  # 89 images to calibrate with
    settings = ["data.batch_size=1", "evaluate=true", "model.width=4", few]
    output, _ = two_ranks.run(recalibrated, [*files, *settings])
    assert re.search(r"^ bn1 +89 ", output, re.MULTILINE)
    assert "cross-entropy" in output
    old, new = (torch.load(tmp_path / name, weights_only=True) for name in ("last.pt", "out.pt"))
    assert new["step"] == 5
    changed = [n for n, v in old["model"].items() if not torch.equal(v, new["model"][n])]
    assert len(changed) == 2 * 19
    assert all(name.endswith(("running_mean", "running_var")) for name in changed)


@pytest.mark.parametrize("data", ["digits", "cifar10", "imagefolder"])
def test_every_data_set_composes(data: str) -> None:
    cfg = config(f"data={data}", "model=resnet50", *([] if data == "digits" else ["data.root=X"]))
    assert cfg.data.source == data
    assert (cfg.model.name, cfg.model.data.source) == ("resnet50", data)
    assert not cfg.data.augment
