"""Runs that a scheduler ends: real signals, to one rank or to a launcher."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from config import TrainConfig
from preemption import REQUEUE_CODE, Preemption, shield_loader_worker
from torch.utils.data import DataLoader
from train import fit

import syncbn
from tests.example.support import (
    PROGRAM,
    Train,
    checkpoint,
    entries,
    finish,
    fit_rank,
    launch,
    tiny,
)
from tests.ranks import Pool

# 22 steps an epoch.
STEPS = ["model.width=4", "dtype=float64", "log_every=1", "data.batch_size=32", "max_steps=30"]
KINDS = ("step", "epoch", "checkpoint")


def wait_for_steps(run: Path, count: int) -> None:
    """Wait until a run has recorded so many steps."""
    deadline = time.monotonic() + 90
    while len(entries(run, "step")) < count:
        assert time.monotonic() < deadline, f"{run} has no step {count}"
        time.sleep(0.01)


def check_last_line(run: Path) -> int:
    """Check that last.pt has the step of the last line of metrics; return the step."""
    step: int = checkpoint(run)["step"]
    assert max(entry["step"] for kind in KINDS for entry in entries(run, kind)) == step
    return step


def losses(run: Path) -> list[float]:
    keys = ("loss", "train_loss", "test_loss")
    lines = entries(run, "step") + entries(run, "epoch")
    return [entry[key] for key in keys for entry in lines if key in entry]


@pytest.fixture(scope="module")
def whole(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of an uninterrupted run on two ranks."""
    run = tmp_path_factory.mktemp("whole")
    pool(2, "gloo").run(fit_rank, tiny(*STEPS, f"run_dir={run}"))
    return losses(run)


@contextmanager
def _signal_after(run: Path, steps: int, *numbers: int) -> Iterator[Preemption]:
    """Send signals to this process when a run has recorded so many steps."""

    def send() -> None:
        wait_for_steps(run, steps)
        for number in numbers:
            os.kill(os.getpid(), number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    preemption = Preemption()
    preemption.record_signals()
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield preemption
    finally:
        sender.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _fit_and_signal_rank(rank: int, cfg: TrainConfig, step: int, *numbers: int) -> int:
    info = syncbn.RankInfo(rank, 2, rank, torch.device("cpu"))
    assert cfg.run_dir is not None
    with _signal_after(Path(cfg.run_dir), step, *(numbers if rank == 1 else ())) as preemption:
        fit(cfg, info, preemption)
    return preemption.exit_code


def test_signals_to_one_rank_end_all_ranks_after_one_step(
    pool: Pool, whole: list[float], tmp_path: Path
) -> None:
    """Within an epoch, and between its last step and its evaluation."""
    cfg = tiny(*STEPS, f"run_dir={tmp_path}", "resume=auto")
    ranks = pool(2, "gloo")
    for step, numbers, code in (
        (3, [signal.SIGTERM], 0),
        (21, [signal.SIGTERM, signal.SIGUSR1], REQUEUE_CODE),
    ):
        assert ranks.run(_fit_and_signal_rank, cfg, step, *numbers) == [code, code]
        assert step < check_last_line(tmp_path) < step + 6
    ranks.run(fit_rank, cfg)
    assert losses(tmp_path) == pytest.approx(whole, rel=1e-14)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, REQUEUE_CODE)])
def test_torchrun_ends_with_the_code_of_the_ranks_after_they_have_saved(
    number: int, code: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = launch("torchrun", PROGRAM, *STEPS, f"run_dir={run}", cwd=tmp_path, NPROC=2)
    try:
        wait_for_steps(run, 3)
    finally:
        job.send_signal(number)
    finish(job, code=code)
    assert 3 <= check_last_line(run) < 50


def test_torchrun_kills_ranks_that_do_not_end_in_time(tmp_path: Path) -> None:
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True)"
    (tmp_path / "stuck.py").write_text(f"{program}; time.sleep(50)")
    job = launch("torchrun", "stuck.py", cwd=tmp_path, NPROC=1, GRACE=1)
    assert job.stdout is not None
    assert job.stdout.readline() == "1\n"
    job.terminate()
    finish(job, code=128 + signal.SIGKILL)


def test_checkpoints_within_an_epoch_follow_the_clock(train: Train, tmp_path: Path) -> None:
    train("max_steps=5", f"run_dir={tmp_path}", "checkpoint.every_minutes=0")
    assert [entry["step"] for entry in entries(tmp_path, "checkpoint")] == [2, 3, 4]


def _send(number: int, pid: int) -> None:
    """Send a signal from another process."""
    subprocess.run(["bash", "-c", f"kill -{number} {pid}"], check=True)


def test_loader_worker_ends_with_its_rank_only() -> None:
    loader: DataLoader[int] = DataLoader(
        range(20),  # type: ignore[arg-type]  # a range has the methods of a dataset
        num_workers=1,
        worker_init_fn=shield_loader_worker,
    )
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    for number in (signal.SIGTERM, signal.SIGUSR1):
        _send(number, worker.pid)
    assert len(list(batches)) == 19
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
