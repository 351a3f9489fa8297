"""Launcher detection from the documented environment variables."""

from __future__ import annotations

import pytest

from syncbn.distributed.launchers import detect_launcher, is_multi_process


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ("", "none"),
        ("RANK WORLD_SIZE", "none"),
        ("TORCHELASTIC_RUN_ID", "torchrun"),
        ("OMPI_COMM_WORLD_SIZE PMIX_RANK", "mpirun"),
        ("PMI_SIZE MPI_LOCALNRANKS", "mpirun"),
        ("PMI_SIZE", "mpirun"),
        ("SLURM_STEP_NUM_TASKS PMIX_RANK", "srun"),
        ("SLURM_STEP_NUM_TASKS PMI_SIZE", "srun"),
        ("SLURM_STEP_NUM_TASKS OMPI_COMM_WORLD_SIZE", "mpirun"),
        ("SLURM_STEP_NUM_TASKS PMI_SIZE MPI_LOCALNRANKS", "mpirun"),
        ("SLURM_STEP_NUM_TASKS TORCHELASTIC_RUN_ID", "torchrun"),
    ],
)
def test_detect_launcher(variables: str, name: str) -> None:
    assert detect_launcher(dict.fromkeys(variables.split(), "2")) == name


def test_multi_process() -> None:
    assert is_multi_process({"OMPI_COMM_WORLD_SIZE": "2"})
    assert not is_multi_process({})
    # An interactive shell on a compute node.
    assert not is_multi_process({"SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "1"})
