"""Runs of benchmarks as commands."""

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

from tests.processes import run_forked
from tests.transports import ROOT


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a new process group, with its report in a folder."""
    # The command itself must let Open MPI run as root, and has no terminal.
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
    """Return the processes with a folder in their command line: mpirun, then the ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(folder) in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass  # the process has ended
    return sorted(found)


def wait_for(count: int, folder: Path) -> list[int]:
    deadline = time.monotonic() + 30
    while len(found := processes_of(folder)) != count:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def percentiles(results: Any) -> list[dict[str, float]]:
    """Return every median with its percentiles in the results of a report."""
    if isinstance(results, list):
        return [found for item in results for found in percentiles(item)]
    if not isinstance(results, dict):
        return []
    return [results] if "median" in results else percentiles(list(results.values()))


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results in the report of a benchmark, after a check of its percentiles."""
    results: dict[str, Any] = json.loads((folder / "report.json").read_text())["results"]
    for found in percentiles(results):
        assert all(map(math.isfinite, found.values()))
        assert found["low"] <= found["median"] <= found["high"]
    return results


def run(folder: Path, *command: str, seconds: float = 100) -> tuple[str, dict[str, Any]]:
    """Run a benchmark in a new process; return its output and its results."""
    with started([sys.executable, "-m", *command], folder) as job:
        output, errors = job.communicate(timeout=seconds)
    assert job.returncode == 0, errors
    assert max(map(len, output.splitlines())) <= 160
    return output, read_results(folder)


def run_here(folder: Path, *settings: str) -> tuple[str, dict[str, Any]]:
    """Run a benchmark in a fork of this process, without another import of torch."""
    done = run_forked("syncbn.cli.bench", [*settings, f"json={folder / 'report.json'}"], ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout, read_results(folder)
