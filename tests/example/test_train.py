"""The example as a whole, on a single rank and on the ranks of a pool."""

from __future__ import annotations

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

import syncbn
from tests.example.support import (
    Train,
    checkpoint,
    composed,
    entries,
    fit_errors,
    fit_rank,
    tiny,
    write_folder,
)
from tests.ranks import Ranks


def test_two_ranks_train_as_one_process_at_the_global_batch(
    two_ranks: Ranks, train: Train, tmp_path: Path
) -> None:
    """The promise of the library: the numbers of one big batch, here of torch's own layer."""
    steps = ["dtype=float64", "max_steps=7"]
    norm = ["norm=sync", "norm.fused=true"]
    one = train(*steps, "norm=local", "data.batch_size=240", f"run_dir={tmp_path / 'one'}")
    runs = [tmp_path / "two", tmp_path / "fused"]
    cfgs = [tiny(*steps, *norm[: i + 1], f"run_dir={run}") for i, run in enumerate(runs)]
    two_ranks.run(fit_rank, *cfgs)
    for two in runs:
        for kind, keys in (("step", "loss lr epoch"), ("epoch", "test_loss train_loss")):
            for key in keys.split():
                got, expected = ([e[key] for e in entries(run, kind)] for run in (two, one))
                assert got == pytest.approx(expected, abs=1e-10)
        for ours, theirs in zip(entries(two, "epoch"), entries(one, "epoch"), strict=True):
            assert ours["test_correct"] == theirs["test_correct"]
            assert ours["test_samples"] == theirs["test_samples"] == 360
        torch.testing.assert_close(
            checkpoint(two)["model"], checkpoint(one)["model"], atol=1e-10, rtol=1e-10
        )


def test_run_directory_holds_one_of_each_file(train: Train, tmp_path: Path) -> None:
    run = train("data.batch_size=240", "epochs=2", "log_every=2", f"run_dir={tmp_path}")
    assert run == tmp_path
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
    # Different statistics on each rank, as after unsynchronized training.
    torch.manual_seed(rank)
    net(torch.randn(16, 1, 8, 8, dtype=torch.float64))
    info = syncbn.RankInfo(rank, 2, rank, torch.device("cpu"))
    compute = build_compute(cfg, info.device)
    totals = evaluate(net, data.eval_batches(test, cfg.data, info), compute)
    return totals.loss, totals.correct, totals.samples


@pytest.mark.parametrize(("fraction", "samples"), [(0.0125, 23), (0.0056, 11)])
def test_evaluation_counts_each_sample_once(
    two_ranks: Ranks, fraction: float, samples: int
) -> None:
    """Uneven shares; the oracle evaluates the network of rank 0 on the whole set at once."""
    cfg = composed(f"data.test_fraction={fraction}")
    _, test = digits.load(cfg.data, 0)
    net = build_resnet(cfg.model, 1, 10, seed=0).double()
    net(torch.randn(16, 1, 8, 8, dtype=torch.float64))
    images = torch.stack([test[i][0] for i in range(len(test))]).double()
    labels = torch.tensor([test[i][1] for i in range(len(test))])
    with torch.no_grad():
        logits = net.eval()(images)
    expected = pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-12)
    correct = int((logits.argmax(1) == labels).sum())
    assert two_ranks.run(_evaluate, fraction) == [(expected, correct, samples)] * 2


def test_amp_clipping_and_channels_last_train(train: Train, tmp_path: Path) -> None:
    settings = ["amp=bfloat16", "optimizer.clip_norm=1", "memory_format=channels_last"]
    train("data.batch_size=240", "epochs=2", *settings, f"run_dir={tmp_path}")
    losses = [entry["loss"] for entry in entries(tmp_path, "step")]
    assert losses[-1] < losses[0]
    weight = checkpoint(tmp_path)["model"]["layer1.0.conv1.weight"]
    assert weight.dtype == torch.float32
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_clip_norm_bounds_the_update(train: Train, tmp_path: Path) -> None:
    """One step at rate 1 without momentum or decay moves the weights by the clipped gradient."""
    plain = ["optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.weight_decay=0"]
    rate = ["optimizer.lr=1", "optimizer.lr_batch=null", "optimizer.warmup_epochs=0"]
    job = [*plain, *rate, "optimizer.clip_norm=0.01", "dtype=float64"]
    train(*job, "max_steps=1", f"run_dir={tmp_path}")
    cfg = tiny()
    net = build_resnet(cfg.model, 1, 10, cfg.seed).double()
    after = checkpoint(tmp_path)["model"]
    moved = [(after[name] - p.detach()).flatten() for name, p in net.named_parameters()]
    assert torch.cat(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_nonfinite_loss_ends_the_run(train: Train, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"got loss (nan|inf), expected a finite number; lower"):
        train("optimizer.lr=1e30", f"run_dir={tmp_path}")


def test_bad_data_on_one_rank_is_an_error_on_both(two_ranks: Ranks, tmp_path: Path) -> None:
    """A node without the folder, or with half of it, must not block the remaining ranks."""
    full, half, absent = (tmp_path / name for name in ("full", "half", "absent"))
    write_folder(full, train=4)
    write_folder(half, train=2)
    common = ["data=imagefolder", "data.workers=0", "data.batch_size=2"]
    ours, missing, fewer = (
        tiny(*common, f"data.root={root}", f"run_dir={tmp_path / 'run'}")
        for root in (full, absent, half)
    )
    jobs = [(ours, missing), (ours, fewer), (tiny("norm=torch_sync"),)]
    errors, others = two_ranks.run(fit_errors, *jobs)
    assert errors == others
    assert errors[0].startswith(f"rank 1: {absent / 'train'}: no such folder")
    assert "got rank 0: (8, 6, 2), rank 1: (4, 6, 2)" in errors[1]
    assert "use norm=sync" in errors[2]
    assert not (tmp_path / "run").exists()


def test_default_run_directories_and_automatic_resume(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = train("name=x", "max_steps=1", "resume=auto")
    second = train("name=x", "max_steps=1")
    assert first.parent == second.parent == Path("runs/x")
    assert first != second
    (tmp_path / "runs" / "x" / "zzz").mkdir()
    assert train("name=x", "max_steps=2", "resume=auto") == second
    assert checkpoint(second)["step"] == 2
