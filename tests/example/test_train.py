"""The example as a whole: on the ranks of a pool, and as the command that users type."""

from __future__ import annotations

import json
from pathlib import Path

import data
import digits
import pytest
import torch
import torch.nn.functional as F
from compute import build_compute
from evaluate import evaluate
from PIL import Image
from resnet import build_resnet
from train import fit

import syncbn
from tests.example.support import (
    PROGRAM,
    TINY,
    checkpoint,
    composed,
    entries,
    finish,
    fit_error,
    fit_rank,
    group_of_one,
    start,
    write_folder,
)
from tests.ranks import Ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("fused", [False, True])
def test_two_ranks_train_as_one_process_at_the_global_batch(
    two_ranks: Ranks, tmp_path: Path, fused: bool
) -> None:
    """The promise of the library: the numbers of one big batch, here of torch's own layer."""
    steps = ["dtype=float64", "max_steps=7", *TINY]
    one, two = tmp_path / "one", tmp_path / "two"
    norm = ("norm=sync", f"norm.fused={fused}")
    two_ranks.run(fit_rank, composed(*steps, *norm, f"run_dir={two}"))
    with group_of_one() as info:
        cfg = composed(*steps, "norm=local", "data.batch_size=240", f"run_dir={one}")
        fit(cfg, info)
    for key in ("loss", "lr", "epoch"):
        got, expected = ([e[key] for e in entries(run, "step")] for run in (two, one))
        assert got == pytest.approx(expected, abs=1e-10)
    for ours, theirs in zip(entries(two, "epoch"), entries(one, "epoch"), strict=True):
        assert ours["test_loss"] == pytest.approx(theirs["test_loss"], abs=1e-10)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-10)
        assert ours["test_correct"] == theirs["test_correct"]
        assert ours["test_samples"] == theirs["test_samples"] == 360
    torch.testing.assert_close(
        checkpoint(two)["model"], checkpoint(one)["model"], atol=1e-10, rtol=1e-10
    )


def test_run_directory_holds_one_of_each_file(alone: syncbn.RankInfo, tmp_path: Path) -> None:
    cfg = composed(*TINY, "data.batch_size=240", "epochs=2", "log_every=2", f"run_dir={tmp_path}")
    assert fit(cfg, alone) == tmp_path
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "curves.png", "last.pt", "best.pt"}
    steps, epochs = entries(tmp_path, "step"), entries(tmp_path, "epoch")
    assert [entry["step"] for entry in steps] == [2, 4, 6, 8, 10]
    assert [entry["epoch"] for entry in steps] == [0.4, 0.8, 1.2, 1.6, 2.0]
    assert [entry["step"] for entry in epochs] == [5, 10]
    # Warm-up over two of ten steps to 0.1 * 240 / 128, then a cosine over eight.
    assert steps[0]["lr"] == pytest.approx(0.1875)
    assert steps[-1]["lr"] < 0.01
    for entry in epochs:
        assert entry["test_accuracy"] == entry["test_correct"] / 360
        assert entry["samples_per_second"] == pytest.approx(5 * 240 / entry["seconds"])
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
    best = max(entry["test_accuracy"] for entry in epochs)
    assert checkpoint(tmp_path)["best_accuracy"] == best
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1500, 600)


def _evaluate(rank: int, fraction: float) -> tuple[float, int, int]:
    cfg = composed(f"data.test_fraction={fraction}", "dtype=float64", "data.eval_batch_size=8")
    _, test = digits.load(cfg.data, 0)
    net = build_resnet(cfg.model, 1, 10, seed=0).double()
    # Statistics of this rank's own, as unsynchronized training leaves them.
    torch.manual_seed(rank)
    net(torch.randn(16, 1, 8, 8, dtype=torch.float64))
    info = syncbn.RankInfo(rank, 2, rank, CPU)
    totals = evaluate(net, data.eval_batches(test, cfg.data, info), build_compute(cfg, CPU))
    return totals.loss, totals.correct, totals.samples


@pytest.mark.parametrize(("fraction", "samples"), [(0.0125, 23), (0.0056, 11)])
def test_evaluation_counts_each_sample_once(
    two_ranks: Ranks, fraction: float, samples: int
) -> None:
    """Uneven shares; the oracle evaluates the network of rank 0 on the whole set at once."""
    cfg = composed(f"data.test_fraction={fraction}")
    _, test = digits.load(cfg.data, 0)
    torch.manual_seed(0)
    net = build_resnet(cfg.model, 1, 10, seed=0).double()
    net(torch.randn(16, 1, 8, 8, dtype=torch.float64))
    images = torch.stack([test[i][0] for i in range(len(test))]).double()
    labels = torch.tensor([test[i][1] for i in range(len(test))])
    with torch.no_grad():
        logits = net.eval()(images)
    expected = F.cross_entropy(logits, labels).item()
    correct = int((logits.argmax(1) == labels).sum())
    for got in two_ranks.run(_evaluate, fraction):
        assert got == (pytest.approx(expected, abs=1e-12), correct, samples)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_amp_clipping_and_channels_last_train(
    amp: str, alone: syncbn.RankInfo, tmp_path: Path
) -> None:
    cfg = composed(
        *TINY,
        *("data.batch_size=240", f"amp={amp}", "optimizer.clip_norm=1", "epochs=2"),
        *("memory_format=channels_last", f"run_dir={tmp_path}"),
    )
    fit(cfg, alone)
    losses = [entry["loss"] for entry in entries(tmp_path, "step")]
    assert losses[-1] < losses[0]
    weight = checkpoint(tmp_path)["model"]["layer1.0.conv1.weight"]
    assert weight.dtype == torch.float32
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_clip_norm_bounds_the_update(alone: syncbn.RankInfo, tmp_path: Path) -> None:
    """One step at rate 1 without momentum or decay moves the weights by the clipped gradient."""
    plain = ["optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.weight_decay=0"]
    rate = ["optimizer.lr=1", "optimizer.lr_batch=null", "optimizer.warmup_epochs=0"]
    cfg = composed(*TINY, *plain, *rate, "max_steps=1", f"run_dir={tmp_path}", "dtype=float64")
    cfg.optimizer.clip_norm = 0.01
    fit(cfg, alone)
    net = build_resnet(cfg.model, 1, 10, cfg.seed).double()
    after = checkpoint(tmp_path)["model"]
    moved = [(after[name] - p.detach()).flatten() for name, p in net.named_parameters()]
    assert torch.cat(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_loss_that_is_not_finite_ends_the_run(alone: syncbn.RankInfo, tmp_path: Path) -> None:
    cfg = composed(*TINY, "optimizer.lr=1e30", f"run_dir={tmp_path}")
    with pytest.raises(RuntimeError, match=r"got loss (nan|inf), expected a finite number; lower"):
        fit(cfg, alone)


def test_bad_data_on_one_rank_is_an_error_on_both(two_ranks: Ranks, tmp_path: Path) -> None:
    """A node without the folder, or with half of it, must not block the remaining ranks."""
    full, half = tmp_path / "full", tmp_path / "half"
    write_folder(full, train=4)
    write_folder(half, train=2)
    common = ["data=imagefolder", "data.workers=0", *TINY, "data.batch_size=2"]
    cfgs = [
        composed(*common, f"data.root={root}", f"run_dir={tmp_path / 'run'}")
        for root in (full, tmp_path / "absent", half)
    ]
    first, second = two_ranks.run(fit_error, cfgs[0], cfgs[1])
    assert first == second
    assert first.startswith(f"rank 1: {tmp_path / 'absent' / 'train'}: no such folder")
    first, second = two_ranks.run(fit_error, cfgs[0], cfgs[2])
    assert first == second
    assert "got rank 0: (8, 6, 2), rank 1: (4, 6, 2)" in first
    first, second = two_ranks.run(fit_error, composed(*TINY, "norm=torch_sync"))
    assert first == second
    assert "use norm=sync" in first
    assert not (tmp_path / "run").exists()


def test_default_run_directories_and_automatic_resume(
    alone: syncbn.RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = fit(composed(*TINY, "name=x", "max_steps=1", "resume=auto"), alone)
    second = fit(composed(*TINY, "name=x", "max_steps=1"), alone)
    assert first.parent == second.parent == Path("runs/x")
    assert first != second
    (tmp_path / "runs" / "x" / "zzz").mkdir()
    third = fit(composed(*TINY, "name=x", "max_steps=2", "resume=auto"), alone)
    assert third == second
    assert checkpoint(second)["step"] == 2


def test_command_makes_one_run_directory_and_prints_one_line_an_epoch(tmp_path: Path) -> None:
    job = start(
        PROGRAM, "experiment=digits_smoke", "model.width=4", "max_steps=4", cwd=tmp_path, NPROC=2
    )
    output = finish(job)
    assert job.returncode == 0, output
    (run,) = (tmp_path / "runs" / "digits_resnet20_sync").iterdir()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert output.count("test accuracy") == 1, output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step"] * 4 + ["epoch"]
    assert lines[-1]["test_samples"] == 360
    assert "\x1b" not in output


def test_unreadable_image_on_one_rank_ends_all_with_its_name(tmp_path: Path) -> None:
    """The other rank waits in a collective then, and must not wait for long."""
    root = tmp_path / "images"
    write_folder(root)
    # The shares of evaluation are every second image; this one belongs to rank 1 alone.
    (root / "val" / "dog" / "0.jpg").write_text("hello")
    images = ["data=imagefolder", f"data.root={root}", "data.image_size=16", "data.workers=1"]
    small = [*TINY, "data.batch_size=2", "epochs=1", "max_steps=1", f"run_dir={tmp_path / 'run'}"]
    job = start(PROGRAM, *images, *small, cwd=tmp_path, NPROC=2)
    output = finish(job, timeout=40)
    assert job.returncode != 0
    assert f"{root / 'val' / 'dog' / '0.jpg'}: got" in output
    assert "expected an image that Pillow can read" in output
