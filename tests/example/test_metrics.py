from __future__ import annotations

import math
from pathlib import Path

import curves
import metrics
import pytest
import torch
from meter import Meter, Totals
from metrics import MetricsFile
from PIL import Image

from tests.disk import almost_full
from tests.ranks import Ranks


def write(path: Path | None, start: int, steps: range) -> None:
    file = MetricsFile(path, start)
    for step in steps:
        file.write("step", step=step, epoch=step / 4, loss=1 / step, lr=0.1)
    file.close()


def test_a_full_disk_leaves_the_entries(tmp_path: Path) -> None:
    """A resumed run first emptied the file, and wrote the entries again."""
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 40))
    before = path.read_bytes()
    with almost_full(1000), pytest.raises(OSError, match="File too large"):
        MetricsFile(path, 30)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_resumed_file_equals_the_file_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """A crash leaves entries after the last checkpoint, and half a line."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    write(whole, 0, range(1, 9))
    write(resumed, 0, range(1, 7))
    with resumed.open("a") as file:
        file.write('{"kind": "step", "st')
    write(resumed, 4, range(5, 9))
    assert resumed.read_text() == whole.read_text()


def test_new_run_replaces_an_old_file_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 9))
    write(path, 0, range(1, 3))
    assert [entry["step"] for entry in metrics.read(path)] == [1, 2]
    write(None, 0, range(1, 3))
    assert list(tmp_path.iterdir()) == [path]
    assert metrics.read(tmp_path / "absent") == []


@pytest.mark.parametrize("epoch", [0.05, 1.0])
def test_curves_are_drawn_for_a_part_of_an_epoch_and_for_many(tmp_path: Path, epoch: float) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for i in range(1, 6):
        file.write("step", step=i, epoch=i * epoch, loss=2 / i, lr=0.1)
        values = {f"{part}_loss": 2 / i for part in ("train", "test")}
        values |= {f"{part}_accuracy": 1 - 1 / i for part in ("train", "test")}
        file.write("epoch", step=i, epoch=i * epoch, **values)
    file.close()
    curves.plot(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "title")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1500, 600)
        # Both lines are drawn in the colours of the legend.
        colors = {color for _, color in picture.convert("RGB").getcolors(2**20) or []}
        assert {(0x64, 0x74, 0x8B), (0xC2, 0x41, 0x0C)} <= colors


def _meter(rank: int) -> tuple[Totals, Totals]:
    meter = Meter(torch.device("cpu"))
    nothing = meter.totals()
    labels = torch.arange(4)
    if rank == 0:
        meter.add(torch.eye(4), labels.where(labels < 3, 0), torch.tensor(0.5))
        meter.add(torch.eye(4), labels.where(labels < 1, 0), torch.tensor(1.0))
        meter.add(torch.eye(2), torch.tensor([1, 1]), torch.tensor(4.0))
    return nothing, meter.totals()


def test_meter_weighs_samples_equally_over_batches_and_ranks(two_ranks: Ranks) -> None:
    """Batches of 4, 4 and 2 samples on rank 0 and none on rank 1."""
    for nothing, totals in two_ranks.run(_meter):
        assert tuple(totals) == ((4 * 0.5 + 4 * 1.0 + 2 * 4.0) / 10, 0.5, 5, 10)
        assert math.isnan(nothing.loss)
        assert nothing.samples == 0
