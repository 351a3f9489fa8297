"""The calibration study, on a few images and without training."""

from __future__ import annotations

import copy
from pathlib import Path

import calibration_study as study
import digits
import pytest
import torch
from calibration_picture import draw
from calibration_study import DATA, MODEL, Labelled, distance
from calibration_table import Finding, Robustness, tables
from corruptions import low_contrast, noise
from resnet import build_resnet
from torch import nn


@pytest.fixture(scope="module")
def data() -> tuple[Labelled, Labelled]:
    train, test = (Labelled.from_images(images) for images in digits.load(DATA, seed=0))
    return Labelled(train.images[:40], train.labels[:40]), test


@pytest.fixture
def net() -> nn.Module:
    return build_resnet(MODEL, channels=1, num_classes=10, seed=0).eval()


def test_only_lockstep_does_not_depend_on_the_batch_size(
    net: nn.Module, data: tuple[Labelled, Labelled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "BATCH_SIZES", (1, 8))
    before = copy.deepcopy(net.state_dict())
    found = study.compare_calibrations(net, *data)
    tools = list(study.calibrations())
    assert [(f.tool, f.batch_size) for f in found] == [
        ("as trained", 0),
        *((tool, batch_size) for batch_size in (1, 8) for tool in tools),
    ]
    for finding in found:
        assert (finding.distance == 0) == (finding.tool == "lockstep")
        assert 0 <= finding.accuracy <= 1
    losses = {f.loss for f in found if f.tool == "lockstep"}
    assert len(losses) == 1
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_distance_equals_the_formula() -> None:
    exact = nn.BatchNorm2d(2, eps=0.0)
    net = copy.deepcopy(exact)
    assert distance(net, exact) == 0
    assert net.running_mean is not None
    net.running_mean[0] = 0.2
    assert distance(net, exact) == pytest.approx(0.2**2 / 2 / 2)


def test_corruptions_go_from_nothing_to_all(data: tuple[Labelled, Labelled]) -> None:
    images = data[1].images
    assert torch.equal(noise(images, 0), images)
    assert torch.equal(noise(images, 2), noise(images, 2))
    assert (noise(images, 2) - images).std() == pytest.approx(2, rel=0.02)
    assert torch.equal(low_contrast(images, 0), images)
    assert low_contrast(images, 1).std((1, 2, 3)).max() < 1e-6
    torch.testing.assert_close(low_contrast(images, 0.5).mean((1, 2, 3)), images.mean((1, 2, 3)))


def test_mixing_is_off_after_the_test(net: nn.Module, data: tuple[Labelled, Labelled]) -> None:
    found = study.compare_on_corrupted(net, data[1], noise, (0.0, 3.0))
    assert [robustness.strength for robustness in found] == [0.0, 3.0]
    assert all(0 <= r.plain <= 1 and 0 <= r.mixed <= 1 for r in found)
    kinds = {type(module) for module in net.modules() if isinstance(module, nn.BatchNorm2d)}
    assert kinds == {nn.BatchNorm2d}


def test_table_and_picture(tmp_path: Path) -> None:
    tools = ["update_bn", "pooled, as PreciseBN", "lockstep"]
    seeds = [
        [
            Finding("as trained", 0, 0.5 + seed, 0.5, 0.01),
            *(Finding(tool, b, 0.3 + seed, 0.75, 0.001) for b in (1, 300) for tool in tools),
        ]
        for seed in (0.0, 0.1)
    ]
    robustness = [[Robustness(0.0, 0.9, 0.8), Robustness(1.0, 0.5, 0.7)]] * 2
    weighted = [[Finding("example_weighted", 2, loss, 0.5, 0.0)] for loss in (0.3, 0.5)]
    lines = tables(seeds, weighted, robustness, robustness).splitlines()
    assert lines[2] == "| as trained" + " | 0.5500, 50.00%, 1.0e-02" * 3 + " |"
    assert lines[4] == "| 300" + " | 0.3500, 75.00%, 1.0e-03" * 3 + " |"
    assert lines[8] == "| 2 | 0.4000 | 50.00% |"
    assert lines[-1] == "| 1.0 | 50.0% | 70.0% | 1.0 | 50.0% | 70.0% |"
    draw(seeds, robustness, robustness, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
