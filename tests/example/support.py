"""Small configurations, small data sets on disk, and launched jobs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import metrics
import numpy as np
import torch
import torch.distributed as dist
from config import TrainConfig, typed
from hydra import compose, initialize_config_dir
from PIL import Image
from train import fit

import syncbn
from syncbn.cli import config_path
from tests.transports import ROOT

PROGRAM = str(ROOT / "examples" / "resnet" / "train.py")
#: Type of the fixture that trains on a single rank, with overrides of the configuration.
Train: TypeAlias = Callable[..., Path]


def composed(*overrides: object) -> TrainConfig:
    """Return the configuration of a command line."""
    with initialize_config_dir(config_dir=config_path(), version_base="1.3"):
        return typed(compose("train", overrides=[str(item) for item in overrides]))


def tiny(*overrides: object) -> TrainConfig:
    """Return a job of five steps an epoch at a global batch of 240."""
    small = ["model.width=4", "log_every=1", "data.batch_size=120", "optimizer.warmup_epochs=0.4"]
    return composed(*small, *overrides)


def fit_rank(rank: int, *cfgs: TrainConfig) -> None:
    """Train on a rank of a worker pool, once for each configuration."""
    for cfg in cfgs:
        info = syncbn.RankInfo(rank, dist.get_world_size(), rank, torch.device("cpu"))
        fit(cfg, info)


def fit_errors(rank: int, *jobs: tuple[TrainConfig, ...]) -> list[str]:
    """Return the `ValueError` of each job, in which each rank may have another configuration."""
    errors = []
    for cfgs in jobs:
        try:
            fit_rank(rank, cfgs[rank % len(cfgs)])
        except ValueError as error:
            errors.append(str(error))
    return errors


def entries(run: Path, kind: str) -> list[metrics.Entry]:
    """Return the lines of one kind in the metrics of a run."""
    return [entry for entry in metrics.read(run / "metrics.jsonl") if entry["kind"] == kind]


def checkpoint(run: Path) -> dict[str, Any]:
    """Return last.pt of a run."""
    saved: dict[str, Any] = torch.load(run / "last.pt", weights_only=True)
    return saved


def write_cifar(root: Path, records: int = 8) -> None:
    """Write the six files of CIFAR-10 with a few random records each."""
    rng = np.random.default_rng(0)
    root.mkdir()
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        data = rng.integers(0, 256, (records, 3073), dtype=np.uint8)
        data[:, 0] = np.arange(records) % 10
        data.tofile(root / name)


def write_folder(root: Path, *, train: int = 4, val: int = 3) -> None:
    """Write random images of different sizes in two classes, "cat" and "dog"."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")


def launch(name: str, *arguments: object, cwd: Path, **variables: object) -> subprocess.Popen[str]:
    """Start launch/NAME.sh, output and errors in one pipe, one thread per rank."""
    environment = {
        **os.environ,
        # The launcher runs the first python3 on PATH.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in variables.items()},
    }
    return subprocess.Popen(
        [ROOT / "launch" / f"{name}.sh", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*jobs: subprocess.Popen[str], code: int | None = 0, limit: float = 100) -> str:
    """Wait for launchers and return their output; a hang or another exit code is a failure.

    Args:
        jobs: launchers.
        code: expected exit code; None for any code except zero.
        limit: time limit in seconds.
    """
    deadline = time.monotonic() + limit
    hangs, output = False, ""
    for job in jobs:
        try:
            printed, _ = job.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # SIGTERM, which torchrun passes on to its ranks; SIGKILL would leave them behind.
            job.terminate()
            printed, _ = job.communicate()
            hangs = True
        output += printed
    assert not hangs, f"no end in time\n{output}"
    for job in jobs:
        assert (job.returncode == code) if code is not None else job.returncode, output
    return output
