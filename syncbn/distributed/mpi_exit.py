"""How a process leaves a job that is broken.

MPI_Finalize waits for all ranks. A rank that has raised must not go there: the others may be
waiting for it in a collective, and then nobody would ever end.
"""

from __future__ import annotations

import atexit
import os
import sys
import time

from syncbn.distributed.mpi_library import MPI

# Other ranks may be printing the same error, and ending the job ends them.
_SECONDS_OF_GRACE = 1.0


def watch_for_errors() -> None:
    """See to it that an uncaught exception ends the job, once the interpreter has printed it."""
    atexit.unregister(end_job_after_error)
    atexit.register(end_job_after_error, os.getpid())


def end_job() -> None:
    """End all ranks; the exit status of the job is not zero. Alone, do nothing."""
    if MPI.Is_finalized() or MPI.COMM_WORLD.size == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_SECONDS_OF_GRACE)
    MPI.COMM_WORLD.Abort(1)


def end_job_after_error(pid: int) -> None:
    """At exit: end the job if an exception ends this process.

    Args:
        pid: of the rank; a process that it has forked inherits this call and is no rank.
    """
    if pid == os.getpid() and (getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)):
        end_job()
