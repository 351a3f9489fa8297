"""A communicator for a group, made within a time."""

from __future__ import annotations

from collections.abc import Sequence

from syncbn.distributed.bounded import bounded
from syncbn.distributed.mpi_library import MPI


def create_communicator(world_ranks: Sequence[int], seconds: float) -> MPI.Intracomm:
    """Return a new communicator; all members must call this, and be here (see ``meet``).

    Args:
        world_ranks: of the members in MPI.COMM_WORLD, in the order of their ranks in the group.
        seconds: after which it is given up, because a member has ended on the way.

    Raises:
        RuntimeError: that, or the processes are not those of one MPI job.
    """
    if len(set(world_ranks)) < len(world_ranks):
        raise RuntimeError(
            f"the {len(world_ranks)} ranks of the group are ranks {world_ranks} of MPI.COMM_WORLD, "
            "which must differ; start the job with mpirun, or use backend 'gloo' with torchrun"
        )
    members = MPI.COMM_WORLD.group.Incl(world_ranks)
    try:
        communicator = bounded(lambda: MPI.COMM_WORLD.Create_group(members), seconds)
    except TimeoutError:
        raise RuntimeError(
            f"MPI has not made a group of its ranks {world_ranks} after {seconds:g} s; one of them "
            "has ended"
        ) from None
    members.Free()
    communicator.Set_errhandler(MPI.ERRORS_RETURN)
    return communicator
