"""Benchmarks as people start them, and what they leave behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.transports import ROOT


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a command with its report in a folder, in a process group of its own."""
    # What lets Open MPI run as root is the command's own business; and of terminals there is none.
    unset = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "COLUMNS")
    with subprocess.Popen(
        [*command, f"json={folder / 'report.json'}"],
        env={name: value for name, value in os.environ.items() if name not in unset},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        try:
            yield job
        finally:
            for process in processes_of(folder):
                os.kill(process, signal.SIGKILL)


def processes_of(folder: Path) -> list[int]:
    """Return the processes that have a folder in their command line: mpirun, then the ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(folder) in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass  # it has ended
    return sorted(found)


def wait_for(count: int, folder: Path) -> list[int]:
    deadline = time.monotonic() + 30
    while len(found := processes_of(folder)) != count:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def spreads(found: Any) -> list[dict[str, float]]:
    """Return every median with its percentiles, wherever it is in a report."""
    if isinstance(found, list):
        return [spread for item in found for spread in spreads(item)]
    if not isinstance(found, dict):
        return []
    return [found] if "median" in found else spreads(list(found.values()))


def run(folder: Path, *command: str) -> tuple[str, dict[str, Any]]:
    """Run a benchmark; return what it prints, and its results."""
    with started([sys.executable, "-m", *command], folder) as job:
        output, errors = job.communicate(timeout=50)
    assert job.returncode == 0, errors
    assert max(map(len, output.splitlines())) <= 160
    results: dict[str, Any] = json.loads((folder / "report.json").read_text())["results"]
    for spread in spreads(results):
        assert all(map(math.isfinite, spread.values()))
        assert spread["low"] <= spread["median"] <= spread["high"]
    return output, results
