"""syncbn-bench collectives, as a command: its report and its tables."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from tests.commands import percentiles, read_results, started
from tests.transports import mpirun


def test_collectives_under_mpirun(tmp_path: Path) -> None:
    command = [*mpirun("openmpi", 2), sys.executable, "-m", "syncbn.cli.bench", "collectives"]
    settings = ["sizes=[1,129]", "repeats=3", "steps=1", "batch=2"]
    with started([*command, *settings], tmp_path) as job:
        output, errors = job.communicate(timeout=50)
    assert job.returncode == 0, errors
    assert output.count("all_reduce of float64 values") == 1
    assert output.count("Training step of ResNet-20") == 1
    assert max(map(len, output.splitlines())) <= 160

    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["benchmark"] == "collectives"
    assert report["settings"]["repeats"] == 3
    assert "Open MPI" in report["facts"]["MPI"]
    assert report["facts"]["ranks"].startswith("2, ")

    results = read_results(tmp_path)
    assert [row["numel"] for row in results["all_reduce"]] == [1, 129]
    positive = [row[name] for row in results["all_reduce"] for name in ("raw", "mpi4py", "gloo")]
    step = results["training_step"]
    positive += [step[name] for name in ("local", "mpi4py", "gloo")]
    assert all(seconds["median"] > 0 for seconds in positive)
    assert math.isfinite(step["ratio"])
    assert len(percentiles(results)) == 2 * 5 + 3 + 2
