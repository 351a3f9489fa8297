"""A resumed run equals the uninterrupted one; mismatched files are rejected."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import storage
import torch
from config import Arch, ModelConfig
from resnet import build_resnet
from weights import load_weights

from tests.disk import almost_full
from tests.example.support import Train, checkpoint, entries, fit_errors, fit_rank, tiny
from tests.ranks import Ranks


def assert_equal(got: Any, expected: Any) -> None:
    """Compare two checkpoints bit for bit."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def timeless(run: Path) -> list[dict[str, object]]:
    timed = ("seconds", "samples_per_second")
    return [
        {key: value for key, value in entry.items() if key not in timed}
        for kind in ("step", "epoch")
        for entry in entries(run, kind)
    ]


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    """Two ranks with local statistics, stopped after an epoch of five steps, and within one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ["norm=local", "optimizer.clip_norm=1"]
    stops = [
        tiny(f"run_dir={parts}", "resume=auto", f"max_steps={stop}", *common) for stop in (5, 7, 10)
    ]
    two_ranks.run(fit_rank, tiny(f"run_dir={whole}", "max_steps=10", *common), *stops)
    got, expected = checkpoint(parts), checkpoint(whole)
    extra = [entry for entry in timeless(parts) if entry not in timeless(whole)]
    assert [entry for entry in timeless(parts) if entry not in extra] == timeless(whole)
    # The run that stopped within an epoch evaluated there, possibly its best.
    assert [(entry["kind"], entry["step"]) for entry in extra] == [("epoch", 7)]
    assert got.pop("best_accuracy") >= expected.pop("best_accuracy")
    assert_equal(got, expected)
    # The network draws no random numbers; dropout would, and must differ between ranks.
    for rank, saved in enumerate(got["ranks"]):
        assert torch.equal(saved["rng"], torch.Generator().manual_seed(rank).get_state())


def test_resume_with_amp_restores_the_gradient_scaler(train: Train, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    common = ["amp=float16", "data.batch_size=700"]
    train(f"run_dir={whole}", "max_steps=3", *common)
    train(f"run_dir={part}", "max_steps=2", *common)
    train(f"run_dir={part}", "max_steps=3", f"resume={part / 'last.pt'}", *common)
    got, expected = checkpoint(part), checkpoint(whole)
    assert expected["scaler"]["_growth_tracker"] == 3
    assert got.pop("best_accuracy") >= expected.pop("best_accuracy")
    assert_equal(got, expected)


def test_a_resume_restores_random_numbers_but_no_hyper_parameters(
    train: Train, tmp_path: Path
) -> None:
    """torch would restore the checkpoint's weight decay and ignore the command line."""
    train(f"run_dir={tmp_path}", "max_steps=1", "seed=5")
    expected = torch.get_rng_state()
    new = ["max_steps=2", "seed=6", "optimizer.weight_decay=0.25"]
    train(f"run_dir={tmp_path}", "resume=auto", *new)
    assert torch.equal(torch.get_rng_state(), expected)
    groups = checkpoint(tmp_path)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]


def test_mismatched_checkpoints_are_errors_on_every_rank(two_ranks: Ranks, tmp_path: Path) -> None:
    """Each ends at once with one message for all ranks, also if only one rank has an error."""
    run, other, text, absent = (tmp_path / name for name in ("run", "other", "text", "absent.pt"))
    two_ranks.run(fit_rank, tiny(f"run_dir={run}", "max_steps=1"))
    text.write_text("hello")
    last = run / "last.pt"
    resume = [f"run_dir={other}", f"resume={last}"]
    cases = {
        ("model.width=8",): f"rank 0: {last}: checkpoint of another architecture; of another "
        "shape: conv1.weight is (4",
        ("model=resnet18", "model.width=4"): "missing: layer2.0.downsample.0.weight, ",
        ("data.batch_size=60",): "got a run of 2 ranks and 5 steps an epoch, expected 2 and 11",
        ("norm=frozen",): "got an optimizer with groups of [20, 39] parameters, expected [20, 1]",
        (f"resume={text}",): f"{text}: cannot be read as a checkpoint",
        ("resume=absent.pt",): "resume: absent.pt is not a file, expected a checkpoint or 'auto'",
        ("resume=null", f"run_dir={run}"): f"run_dir: {run} holds a run already, expected a new",
    }
    jobs = [(tiny(*resume, *overrides),) for overrides in cases]
    first, second = two_ranks.run(fit_errors, *jobs)
    assert first == second
    for got, message in zip(first, cases.values(), strict=True):
        assert message in got
    assert "more" in first[0]
    # Weights that only rank 1 cannot read.
    ours, theirs = (tiny(f"run_dir={other}", f"model.weights={path}") for path in (last, absent))
    for (error,) in two_ranks.run(fit_errors, (ours, theirs)):
        assert error == f"rank 1: {absent}: no such file, expected a checkpoint"


def test_new_run_starts_from_given_weights(train: Train, tmp_path: Path) -> None:
    """Both a checkpoint of the example and a bare state dict, as torchvision publishes them."""
    first = train(f"run_dir={tmp_path / 'first'}", "max_steps=1") / "last.pt"
    weights = checkpoint(tmp_path / "first")["model"]
    torch.save(weights, tmp_path / "bare.pt")
    for source in (first, tmp_path / "bare.pt"):
        start = [f"model.weights={source}", "norm=frozen", "optimizer.lr=0", "max_steps=1"]
        run = train(f"run_dir={tmp_path / source.stem}", *start)
        assert_equal(checkpoint(run)["model"], weights)


def test_weights_are_loaded_atomically() -> None:
    model = ModelConfig(Arch.resnet20, 4, False, None)
    net, other = (build_resnet(model, 1, classes, seed=classes) for classes in (10, 7))
    weights = {**other.state_dict(), "extra": torch.zeros(1)}
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"F.pt: .*; unexpected: extra; .*fc.weight is \(7, 16\)"):
        load_weights(net, weights, Path("F.pt"))
    assert_equal(dict(net.state_dict()), before)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    storage.save({"step": 1}, path)
    # torch's writer raises RuntimeError.
    with almost_full(1000), pytest.raises((OSError, RuntimeError)):
        storage.save({"step": torch.zeros(1000)}, path)
    assert storage.load(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_signal_leaves_no_temporary_file(tmp_path: Path) -> None:
    """Regression: a job that a scheduler ended during a write left half a checkpoint."""
    path = tmp_path / "last.pt"
    if (child := os.fork()) == 0:
        try:
            with storage.writing(path) as file:
                os.kill(os.getpid(), signal.SIGTERM)
                file.write(b"whole")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def _save_forever(path: Path) -> None:
    number = 0
    while True:
        number += 1
        storage.save({"step": number, "weights": torch.full((100_000,), float(number))}, path)


def test_a_checkpoint_is_whole_after_sigkill_at_any_moment(tmp_path: Path) -> None:
    """Each process has saved several times, and is in one of its saves or between two."""
    path, moments, interrupted = tmp_path / "last.pt", random.Random(0), 0
    for _ in range(20):
        path.unlink(missing_ok=True)
        if (child := os.fork()) == 0:
            try:
                _save_forever(path)
            finally:
                os._exit(1)
        while not path.exists():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = storage.load(path)
        assert torch.equal(saved["weights"], torch.full((100_000,), float(saved["step"])))
        for unfinished in tmp_path.glob(".syncbn-*.tmp"):
            interrupted += 1
            unfinished.unlink()
    assert interrupted > 0


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, tuple[Path]]:
            return Path.touch, (tmp_path / "touched",)

    torch.save({"model": Touch()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt: cannot be read as a checkpoint"):
        storage.load(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()
