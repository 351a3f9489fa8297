"""Commands that are run to their end, and leave no ranks behind if there is none."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# Below pytest's own timeout, which would end the whole run.
_SECONDS = 50
_SECONDS_TO_END = 5


def run(
    command: Sequence[str | Path],
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    largest_file: int = -1,
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its exit code and output.

    Args:
        command: and its arguments.
        cwd: folder to run it in.
        environment: variables added to those of this process; one thread a rank is the default.
        largest_file: bytes that a file of its may have; -1 for any.

    Raises:
        TimeoutError: it took too long. Launchers end their ranks when they are told to end, and not
            when they are killed.
    """
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file,) * 2),
    ) as job:
        try:
            output, errors = job.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            job.terminate()
            try:
                output, errors = job.communicate(timeout=_SECONDS_TO_END)
            finally:
                job.kill()
            raise TimeoutError(f"{command}\n{output}\n{errors}") from None
    return subprocess.CompletedProcess(command, job.returncode, output, errors)
