"""A resumed run is the uninterrupted one, and files that do not fit are refused."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import storage
import torch
from config import Arch, ModelConfig, TrainConfig
from resnet import build_resnet
from torch import Tensor
from train import fit
from weights import load_weights

import syncbn
from tests.example.support import (
    TINY,
    checkpoint,
    composed,
    entries,
    fit_error,
    fit_rank,
    group_of_one,
)
from tests.processes import run
from tests.ranks import Ranks


def job(run: Path, *overrides: str) -> TrainConfig:
    return composed(*TINY, f"run_dir={run}", *overrides)


def assert_equal(got: Any, expected: Any) -> None:
    """Compare two checkpoints bit for bit."""
    assert type(got) is type(expected)
    if isinstance(got, dict):
        assert got.keys() == expected.keys()
        for key in got:
            assert_equal(got[key], expected[key])
    elif isinstance(got, list):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_equal(a, b)
    elif isinstance(got, Tensor):
        assert torch.equal(got, expected)
    else:
        assert got == expected


def timeless(run: Path) -> list[dict[str, object]]:
    timed = ("seconds", "samples_per_second")
    return [
        {key: value for key, value in entry.items() if key not in timed}
        for kind in ("step", "epoch")
        for entry in entries(run, kind)
    ]


@pytest.mark.parametrize("stop", [5, 7])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    two_ranks: Ranks, tmp_path: Path, stop: int
) -> None:
    """Two ranks with local statistics, stopped after an epoch of five steps, and within."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    common = ["norm=local", "optimizer.clip_norm=1"]
    two_ranks.run(
        fit_rank,
        job(whole, "max_steps=10", *common),
        job(part, f"max_steps={stop}", *common),
        job(part, "max_steps=10", "resume=auto", *common),
    )
    got, expected = checkpoint(part), checkpoint(whole)
    extra = [entry for entry in timeless(part) if entry not in timeless(whole)]
    assert [entry for entry in timeless(part) if entry not in extra] == timeless(whole)
    if stop == 7:
        # The run that stopped there evaluated there, which may have been its best.
        assert [(entry["kind"], entry["step"]) for entry in extra] == [("epoch", 7)]
        assert got.pop("best_accuracy") >= expected.pop("best_accuracy")
    else:
        assert extra == []
    assert_equal(got, expected)
    # The network draws nothing; dropout, were there any, would differ between ranks.
    for rank, saved in enumerate(got["ranks"]):
        assert torch.equal(saved["rng"], torch.Generator().manual_seed(rank).get_state())


def test_resume_with_amp_restores_the_gradient_scaler(
    alone: syncbn.RankInfo, tmp_path: Path
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    common = ["amp=float16", "data.batch_size=700"]
    fit(job(whole, "max_steps=3", *common), alone)
    fit(job(part, "max_steps=2", *common), alone)
    fit(job(part, "max_steps=3", f"resume={part / 'last.pt'}", *common), alone)
    got, expected = checkpoint(part), checkpoint(whole)
    assert expected["scaler"]["_growth_tracker"] == 3
    assert got.pop("best_accuracy") >= expected.pop("best_accuracy")
    assert_equal(got, expected)


def test_new_hyper_parameters_hold_after_a_resume(alone: syncbn.RankInfo, tmp_path: Path) -> None:
    """torch would restore the checkpoint's values and ignore the command line."""
    fit(job(tmp_path, "max_steps=1"), alone)
    fit(job(tmp_path, "max_steps=2", "resume=auto", "optimizer.weight_decay=0.25"), alone)
    groups = checkpoint(tmp_path)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]


def test_random_numbers_go_on_where_they_stopped(tmp_path: Path) -> None:
    with group_of_one() as info:
        fit(job(tmp_path, "max_steps=1", "seed=5"), info)
        expected = torch.get_rng_state()
    torch.manual_seed(1)
    with group_of_one() as info:
        fit(job(tmp_path, "max_steps=1", "seed=6", "resume=auto"), info)
    assert torch.equal(torch.get_rng_state(), expected)


def test_checkpoints_that_do_not_fit_are_errors_on_every_rank(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    """Each ends at once with one message for all ranks, also if one rank alone cannot go on."""
    run, other, text = tmp_path / "run", tmp_path / "other", tmp_path / "text.pt"
    two_ranks.run(fit_rank, job(run, "max_steps=1"))
    text.write_text("hello")
    last = run / "last.pt"

    def error(*cfgs: TrainConfig) -> str:
        first, second = two_ranks.run(fit_error, *cfgs)
        assert first == second
        return str(first)

    resume = f"resume={last}"
    got = error(job(other, resume, "model.width=8"))
    assert "rank 0: " in got
    assert (
        f"{last}: checkpoint of another architecture; of another shape: conv1.weight is (4" in got
    )
    assert "more" in got
    got = error(job(other, resume, "model=resnet18", "model.width=4"))
    assert "missing: layer2.0.downsample.0.weight, " in got
    got = error(job(other, resume, "data.batch_size=60"))
    assert "got a run of 2 ranks and 5 steps an epoch, expected 2 and 11" in got
    got = error(job(other, resume, "norm=frozen"))
    assert "got an optimizer with groups of [20, 39] parameters, expected [20, 1]" in got
    got = error(job(other, f"resume={text}"))
    assert f"{text}: cannot be read as a checkpoint" in got
    got = error(job(other, "resume=absent.pt"))
    assert "resume: absent.pt is not a file, expected a checkpoint or 'auto'" in got
    got = error(job(run))
    assert f"run_dir: {run} holds a run already" in got
    # Weights that rank 1 alone cannot read.
    ours, theirs = (job(other, f"model.weights={path}") for path in (last, tmp_path / "absent.pt"))
    got = error(ours, theirs)
    assert got == f"rank 1: {tmp_path / 'absent.pt'}: no such file, expected a checkpoint"


def test_new_run_starts_from_given_weights(alone: syncbn.RankInfo, tmp_path: Path) -> None:
    """Both a checkpoint of the example and a bare state dict, as torchvision publishes them."""
    fit(job(tmp_path / "first", "max_steps=3"), alone)
    first = checkpoint(tmp_path / "first")
    torch.save(first["model"], tmp_path / "bare.pt")
    for source in (tmp_path / "first" / "last.pt", tmp_path / "bare.pt"):
        run = tmp_path / source.stem
        start = [f"model.weights={source}", "norm=frozen", "optimizer.lr=0", "max_steps=1"]
        fit(job(run, *start), alone)
        assert_equal(checkpoint(run)["model"], first["model"])


def test_weights_are_loaded_atomically() -> None:
    net = build_resnet(ModelConfig(Arch.resnet20, 4, False, None), 1, 10, seed=0)
    other = build_resnet(ModelConfig(Arch.resnet20, 4, False, None), 1, 7, seed=1)
    weights = {**other.state_dict(), "extra": torch.zeros(1)}
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"F.pt: .*; unexpected: extra; .*fc.weight is \(7, 16\)"):
        load_weights(net, weights, Path("F.pt"))
    assert_equal(dict(net.state_dict()), before)


def test_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    storage.save({"step": 1}, path)

    def fail(saved: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.save({"step": 2}, path)
    assert storage.load(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_signal_leaves_no_temporary_file(tmp_path: Path) -> None:
    """A job that a scheduler ended during a write left half a checkpoint behind."""
    path = tmp_path / "last.pt"
    program = (
        "import os, signal, sys; from pathlib import Path; import storage\n"
        "with storage.writing(Path(sys.argv[1])) as file:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    file.write(b'whole')"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = run([sys.executable, "-c", program, path], tmp_path, environment)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, tuple[Path]]:
            return Path.touch, (tmp_path / "touched",)

    torch.save({"model": Touch()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt: cannot be read as a checkpoint"):
        storage.load(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()
