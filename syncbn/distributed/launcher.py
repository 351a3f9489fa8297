"""What launchers leave in the environment of the processes they start."""

from __future__ import annotations

from collections.abc import Mapping

#: The number of processes, for every process of a job: Open MPI; MPICH and its relatives; MVAPICH.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
#: With one of these srun has set up MPI (its option --mpi).
PMI_RANKS = ("PMIX_RANK", "PMI_RANK")
#: Those of torchrun and srun.
OTHER_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")

# The first that is there counts. An mpirun on several nodes of SLURM starts its helpers with srun,
# and its ranks inherit their variables; srun sets PMI_SIZE itself, with --mpi=pmi2.
_SIGNS = {
    "TORCHELASTIC_RUN_ID": "torchrun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MPI_LOCALNRANKS": "mpirun",  # MPICH and its relatives
    "SLURM_STEP_NUM_TASKS": "srun",
    "PMI_SIZE": "mpirun",
}


def launcher(environ: Mapping[str, str]) -> str:
    """Return what started this process: "torchrun", "mpirun", "srun" or "none"."""
    return next((name for variable, name in _SIGNS.items() if variable in environ), "none")


def is_one_of_several(environ: Mapping[str, str]) -> bool:
    """Return whether a launcher started this process with others."""
    return any(environ.get(name, "1") != "1" for name in (*MPI_SIZES, *OTHER_SIZES))
