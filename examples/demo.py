"""The main job, on real data and two CPU ranks: the gain and the exactness of syncbn.

    make demo
    python examples/demo.py --launcher torchrun

Trains ResNet-20 on handwritten digits at 2 samples a rank, with torch's local BatchNorm2d and with
syncbn, from the same initial weights and on the same samples; the reference is one process at the
global batch of 4. First 20 steps in float64, where every difference is visible, then three epochs
for the accuracy. Prints a table and draws `runs/demo/TIME/demo.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from demo_picture import Run, draw
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
# The small all-reduces of this network take less time over MPI than over Gloo.
LAUNCHERS = ("mpirun", "torchrun")
GLOBAL_BATCH = 4
# Rounding bound of a float64 difference.
EXACT = 1e-10
# A line so often, also without a terminal.
PROGRESS_SECONDS = 5


@dataclass(frozen=True)
class Setup:
    """One way to train on the same samples."""

    title: str
    norm: str
    ranks: int

    def train(self, launcher: str, experiment: str, folder: Path) -> float:
        """Run examples/resnet/train.py on all ranks; return its seconds.

        Raises:
            SystemExit: the job failed; its output has been printed.
        """
        command = [
            str(HERE.parent / "launch" / f"{launcher}.sh"),
            str(HERE / "resnet" / "train.py"),
            f"experiment={experiment}",
            f"norm={self.norm}",
            f"data.batch_size={GLOBAL_BATCH // self.ranks}",
            f"run_dir={folder}",
        ]
        environment = {**os.environ, "PYTHON": sys.executable, "NPROC": str(self.ranks)}
        start = time.perf_counter()
        with (
            tempfile.TemporaryFile("w+") as output,
            subprocess.Popen(command, env=environment, stdout=output, stderr=output) as job,
        ):
            while job.poll() is None:
                print(
                    f"{self.title}, {experiment}: {time.perf_counter() - start:.0f} s", flush=True
                )
                with suppress(subprocess.TimeoutExpired):
                    job.wait(PROGRESS_SECONDS)
            if job.returncode != 0:
                output.seek(0)
                sys.exit(f"{' '.join(command)}\n{output.read()}")
        return time.perf_counter() - start


# The first is the reference.
SETUPS = (
    Setup("one process, batch 4", "local", 1),
    Setup("two ranks, local BN", "local", 2),
    Setup("two ranks, syncbn", "sync", 2),
)


def largest_difference(folder: Path, reference: Path) -> float:
    """Return the largest absolute difference of any parameter or buffer at the end of two runs."""
    model, expected = (
        torch.load(path / "last.pt", weights_only=True)["model"] for path in (folder, reference)
    )
    assert list(model) == list(expected)
    differences = ((model[name].double() - expected[name].double()).abs().max() for name in model)
    return max(float(difference) for difference in differences)


def read_run(title: str, exact: Path, trained: Path) -> Run:
    """Return the losses of a run's first steps and the accuracies of its epochs."""
    losses = [entry["loss"] for entry in _metrics(exact) if entry["kind"] == "step"]
    epochs = [entry for entry in _metrics(trained) if entry["kind"] == "epoch"]
    accuracies = [entry["test_accuracy"] for entry in epochs]
    return Run(title, losses, [entry["epoch"] for entry in epochs], accuracies)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Run the six jobs, print the table, draw the picture; fail if syncbn is not exact."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launcher", choices=LAUNCHERS, default=LAUNCHERS[0])
    launcher = parser.parse_args().launcher
    console = Console()
    home = Path("runs") / "demo" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    runs, differences = [], []
    table = Table(title="ResNet-20 on digits: the same samples, the same initial weights")
    table.add_column("")
    for heading in ("test accuracy", "seconds", "off by, 20 steps"):
        table.add_column(heading, justify="right")
    for setup in SETUPS:
        trained = home / f"{setup.norm}_{setup.ranks}"
        exact = home / f"{trained.name}_exact"
        setup.train(launcher, "digits_exact", exact)
        seconds = setup.train(launcher, "digits_resnet20", trained)
        runs.append(read_run(setup.title, exact, trained))
        differences.append(largest_difference(exact, home / f"{SETUPS[0].norm}_1_exact"))
        accuracy = f"{runs[-1].accuracies[-1]:.2%}"
        difference = "the reference" if setup is SETUPS[0] else f"{differences[-1]:.1e}"
        table.add_row(setup.title, accuracy, f"{seconds:.0f}", difference)
    single, local, sync = runs
    draw(single, local, sync, home / "demo.png")
    console.print(table)
    console.print(
        f"float64, 20 steps, two ranks with syncbn against one process at batch {GLOBAL_BATCH}: "
        f"parameters and buffers equal to {differences[-1]:.1e}\n"
        f"test accuracy: local BN {local.accuracies[-1]:.2%}, syncbn {sync.accuracies[-1]:.2%}\n"
        f"picture: {home / 'demo.png'}",
        soft_wrap=True,
    )
    if differences[-1] > EXACT:
        sys.exit(f"expected at most {EXACT:.0e}: two ranks did not train as one process")


if __name__ == "__main__":
    main()
