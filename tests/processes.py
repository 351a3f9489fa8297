"""Commands with a timeout that leaves no ranks behind."""

from __future__ import annotations

import os
import resource
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

# Below pytest's timeout, which would end the whole run.
_SECONDS = 100
_SECONDS_TO_END = 5


def run(
    command: Sequence[str | Path],
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    largest_file: int = -1,
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its exit code and output.

    Args:
        command: program and arguments.
        cwd: working directory.
        environment: variables added to this process's environment; default: one thread per rank.
        largest_file: maximal file size in bytes; -1 for no limit.

    Raises:
        TimeoutError: the command exceeded the time limit. It is terminated, not killed, so that a
            launcher ends its ranks.
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


def run_forked(
    module: str, arguments: Sequence[str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a module as a command in a fork of this process, which has imported torch already."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        if (child := os.fork()) == 0:
            status = 1
            try:
                for file, descriptor in ((output, 1), (errors, 2)):
                    os.dup2(file.fileno(), descriptor)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                os.chdir(cwd)
                sys.argv = [module, *arguments]
                # As in a new process; runpy warns if a test has imported the module.
                warnings.resetwarnings()
                sys.modules.pop(module, None)
                runpy.run_module(module, run_name="__main__", alter_sys=True)
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read())[1] for file in (output, errors)]
    return subprocess.CompletedProcess([module, *arguments], status, *texts)
