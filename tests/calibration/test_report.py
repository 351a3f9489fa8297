"""Figures of a report, compared with simulations and explicit formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import syncbn
from syncbn.calibration.display import render_metrics
from tests.calibration.networks import images, network


def _one_layer(channels: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels, eps=1e-3)).double()


def _draw(samples: int, generator: np.random.Generator) -> torch.Tensor:
    """Return samples with correlated pixels: each has a brightness and a contrast."""
    brightness = generator.normal(size=(samples, 2, 1, 1)) * np.array([0.5, 2.0])[:, None, None]
    contrast = generator.uniform(0.2, 1.5, size=(samples, 2, 1, 1))
    pixels = generator.normal(size=(samples, 2, 4, 4))
    return torch.from_numpy(3 + brightness + contrast * pixels)


def test_standard_errors_match_scatter() -> None:
    generator = np.random.default_rng(0)
    means, variances, errors = [], [], []
    for _ in range(300):
        # One batch and one layer: all methods have the same result, and this one takes least time.
        report = syncbn.recalibrate(_one_layer(), [_draw(60, generator)], method="pooled")
        channels = report.layers[0].channels
        means.append(channels.new_mean)
        variances.append(channels.new_var)
        errors.append(torch.stack([channels.mean_error, channels.var_error]))
    scatter = torch.stack([torch.stack(means).std(0), torch.stack(variances).std(0)])
    ratio = torch.stack(errors).mean(0) / scatter
    assert ratio.min() > 0.85
    assert ratio.max() < 1.15


def test_standard_errors_independent_of_batches() -> None:
    x = torch.cat([_draw(40, np.random.default_rng(1)), torch.full((1, 2, 4, 4), 9.0)])
    found = []
    for batch_size in (1, 7, 41):
        report = syncbn.recalibrate(_one_layer(), x.split(batch_size))
        channels = report.layers[0].channels
        found.append(torch.stack([channels.mean_error, channels.var_error, channels.between]))
    torch.testing.assert_close(found[0], found[2], rtol=1e-9, atol=0)
    torch.testing.assert_close(found[1], found[2], rtol=1e-9, atol=0)
    between = x.mean((2, 3)).var(0)
    torch.testing.assert_close(found[2][2], between, rtol=1e-9, atol=0)


def test_drift() -> None:
    net = _one_layer()
    net[0].running_mean.copy_(torch.tensor([2.0, 4.0]))  # type: ignore[operator]
    net[0].running_var.copy_(torch.tensor([0.5, 9.0]))  # type: ignore[operator]
    x = _draw(50, np.random.default_rng(2))
    report = syncbn.recalibrate(net, x.split(9))
    layer = report.layers[0]
    values = x.transpose(0, 1).flatten(1)
    new = Normal(values.mean(1), (values.var(1) + 1e-3).sqrt())
    old = Normal(torch.tensor([2.0, 4.0]).double(), (torch.tensor([0.5, 9.0]) + 1e-3).sqrt())
    assert layer.kl == pytest.approx(float(kl_divergence(new, old).mean()), rel=1e-6)
    shift = (new.mean - old.mean) / new.stddev
    assert layer.mean_shift == pytest.approx(float(shift.square().mean().sqrt()), rel=1e-6)
    ratios = (new.variance / old.variance).tolist()
    assert layer.var_ratio == pytest.approx(math.sqrt(ratios[0] * ratios[1]), rel=1e-6)
    assert (layer.samples, layer.count) == (50, 800)


def test_verdicts() -> None:
    net, x = network(), images(24)
    report = syncbn.recalibrate(net, x.split(4))
    worst = max(report.layers, key=lambda layer: layer.kl)
    assert report.verdict().startswith(f"recalibration changes {worst.name} by ")
    again = syncbn.recalibrate(net, x.split(4)).verdict()
    assert again.startswith("running statistics are fine; recalibration changes most ")
    assert "few" in again  # 24 samples
    generator = np.random.default_rng(3)
    one = _one_layer()
    syncbn.recalibrate(one, [_draw(5000, generator)])
    verdict = syncbn.recalibrate(one, [_draw(5000, generator)]).verdict()
    assert verdict.startswith("running statistics are fine")
    assert "few" not in verdict
    one[0].running_mean[1] = math.nan  # type: ignore[operator]
    assert "not finite" in syncbn.recalibrate(one, [_draw(50, generator)]).verdict()


def test_standard_error_of_one_sample_is_nan(tmp_path: Path) -> None:
    report = syncbn.recalibrate(_one_layer(), [_draw(1, np.random.default_rng(0))])
    assert math.isnan(report.layers[0].mean_error)
    assert "1 samples are few" in report.verdict()
    report.plot(tmp_path / "report.png")
    path = tmp_path / "report.json"
    report.save(path)
    assert json.loads(path.read_text())["layers"][0]["mean_error"] is None
    # A failed save leaves the old file.
    object.__setattr__(report.layers[0], "name", object())
    with pytest.raises(TypeError):
        report.save(path)
    assert json.loads(path.read_text())["layers"][0]["name"] == "0"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["report.json", "report.png"]


def test_table_json_and_picture(tmp_path: Path) -> None:
    net = network()
    net.add_module("unused", nn.BatchNorm1d(2))
    report = syncbn.recalibrate(
        net, images().split(4), forward=lambda model, batch: net[:-1](batch)
    )
    table = report.table()
    for layer in report.layers:
        assert layer.name in table
    assert "not reached, unchanged: unused" in table
    assert report.verdict().split(";")[0][:40] in table
    report.save(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["verdict"] == report.verdict()
    assert found["not_reached"] == ["unused"]
    assert [layer["kl"] for layer in found["layers"]] == [layer.kl for layer in report.layers]
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.png"]


def test_table_escapes_names() -> None:
    """A layer's name from a file moved the cursor; a name in brackets was parsed as markup."""
    names = ["a\x1b[2Jb", "x\u202ey\nz", "[red]", ":smile:"]
    net = nn.Sequential()
    for name in names:
        net.add_module(name, nn.BatchNorm2d(2))
    net.add_module("later\x07", nn.BatchNorm2d(2))
    net.train()[-1].eval()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 2, 3, 3))).float()
    table = syncbn.recalibrate(net, x.split(2)).table()
    assert all(c.isprintable() or c == "\n" for c in table)
    for shown in (r"a\x1b[2Jb", r"x\u202ey\nz", "[red]", ":smile:", r"later\x07"):
        assert shown in table
    shown = render_metrics({"loss\x1b[31m": 1.0}, {"loss\x1b[31m": 0.5})
    assert r"loss\x1b[31m   1.0000   0.5000" in shown


@pytest.mark.parametrize("shown", [True, False, None])
def test_progress_bar(shown: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    syncbn.recalibrate(network(), images().split(4), progress=shown)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("recalibrating (lockstep)" in captured.err and "5/5" in captured.err) is bool(shown)
