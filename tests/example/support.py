"""Small configurations, small data sets on disk, and processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

REPOSITORY = Path(__file__).parents[2]
PROGRAM = str(REPOSITORY / "examples" / "resnet" / "train.py")
LAUNCHER = str(REPOSITORY / "launch" / "torchrun.sh")
# Five steps an epoch at a global batch of 240.
TINY = ["model.width=4", "log_every=1", "data.batch_size=120", "optimizer.warmup_epochs=0.4"]


def composed(*overrides: object) -> TrainConfig:
    """Return the configuration that the command line would give."""
    with initialize_config_dir(config_dir=config_path(), version_base="1.3"):
        return typed(compose("train", overrides=[str(item) for item in overrides]))


@contextmanager
def group_of_one() -> Iterator[syncbn.RankInfo]:
    """Initialize torch.distributed for this process alone, for a while."""
    info = syncbn.init_process_group()
    try:
        yield info
    finally:
        dist.destroy_process_group()


def fit_rank(rank: int, *cfgs: TrainConfig) -> None:
    """Train on a rank of a worker pool, once for each configuration."""
    for cfg in cfgs:
        info = syncbn.RankInfo(rank, dist.get_world_size(), rank, torch.device("cpu"))
        fit(cfg, info)


def fit_error(rank: int, *cfgs: TrainConfig) -> str:
    """Train on a rank of a worker pool with its own configuration, and return the `ValueError`."""
    try:
        fit_rank(rank, cfgs[rank % len(cfgs)])
    except ValueError as error:
        return str(error)
    return "no error"


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


def start(*arguments: object, cwd: Path, **variables: object) -> subprocess.Popen[str]:
    """Start launch/torchrun.sh."""
    return launch(LAUNCHER, *arguments, cwd=cwd, **variables)


def launch(
    script: str, *arguments: object, cwd: Path, **variables: object
) -> subprocess.Popen[str]:
    """Start a launcher, output and errors in one pipe, one thread a rank."""
    environment = {
        **os.environ,
        # The launcher runs whatever python3 comes first.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in variables.items()},
    }
    return subprocess.Popen(
        [script, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str], timeout: float = 50) -> str:
    """Wait for launchers and return their output; a hang is a failure."""
    deadline = time.monotonic() + timeout
    hangs, output = False, ""
    for process in processes:
        try:
            printed, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # SIGTERM, which torchrun passes on to its ranks; SIGKILL would leave them behind.
            process.terminate()
            printed, _ = process.communicate()
            hangs = True
        output += printed
    assert not hangs, f"no end after {timeout} s\n{output}"
    return output
