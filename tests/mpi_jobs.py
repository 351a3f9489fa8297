"""Programs under mpirun, with the process ids of their ranks."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from tests import transports

# Start of every program: each rank prints its process id.
HEAD = """
import os, sys, time, torch, torch.distributed as dist, syncbn
from datetime import timedelta
from torch import nn
from tests.worker import poll_often
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
def write(line):  # in one write, because the ranks share the pipe
    sys.stdout.write(line + "\\n")
    sys.stdout.flush()
write(f"pid {rank} {os.getpid()}")
def join(seconds=30):
    return syncbn.init_process_group(timeout=timedelta(seconds=seconds))
"""


class Job:
    """A program under mpirun.

    Args:
        process: process of mpirun.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.pids: dict[int, int] = {}

    def read_until(self, text: str, times: int) -> None:
        """Read the output until a text has occurred that many times."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._append(line)
            times -= line.count(text)  # mpirun may join the lines of two ranks
            if times <= 0:
                return
        raise AssertionError(f"ended without {text!r}:\n{self.output}")

    def finish(self, timeout: float = 40) -> int:
        """Wait for the job; return its exit status."""
        rest, _ = self.process.communicate(timeout=timeout)
        for line in rest.splitlines(keepends=True):
            self._append(line)
        return self.process.returncode

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def _append(self, line: str) -> None:
        self.lines.append(line)
        if found := re.search(r"pid (\d+) (\d+)", line):
            self.pids[int(found[1])] = int(found[2])


class Launch:
    """Starts jobs; terminates the jobs left by a failed test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs: list[Job] = []

    def __call__(
        self,
        transport: str,
        size: int,
        program: str,
        *,
        lenient: bool = False,
        variables: Mapping[str, str | None] | None = None,
    ) -> Job:
        path = self._folder / "program.py"
        path.write_text(HEAD + program)
        (process,) = transports.start(
            transport,
            size,
            [path],
            outlives_ranks=lenient,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            variables=variables,
        )
        self._jobs.append(Job(process))
        return self._jobs[-1]

    def close(self) -> None:
        for job in self._jobs:
            job.process.terminate()
            job.process.communicate()


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_gone(job: Job, ranks: int) -> None:
    assert len(job.pids) == ranks, job.output
    deadline = time.monotonic() + 5
    while any(runs(pid) for pid in job.pids.values()):
        assert time.monotonic() < deadline, f"still running: {job.pids}\n{job.output}"
        time.sleep(0.05)
