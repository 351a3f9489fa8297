"""Launchers, from variables recorded in their jobs."""

from __future__ import annotations

import pytest

from syncbn.distributed.launchers import (
    LAUNCHERS,
    LaunchedRank,
    detect_launcher,
    find_address,
    find_launcher,
    is_multi_process,
    read_rank,
)

MASTER = "MASTER_ADDR=10.0.0.7 MASTER_PORT=2345"
FROM_VARIABLES = "10.0.0.7", 2345, "MASTER_ADDR and MASTER_PORT"
SLURM = (
    "SLURM_STEP_NUM_TASKS=6 SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=4 SLURM_JOB_ID=812 "
    "SLURM_STEP_ID=3 SLURM_STEP_NODELIST=gpu[007-009,012]-ib,login"
)
FROM_SLURM = (
    "gpu007-ib",
    20000 + (812 * 16 + 3) % 12000,
    "SLURM_STEP_NODELIST and SLURM_JOB_ID, without MASTER_ADDR and MASTER_PORT",
)
ELASTIC = "TORCHELASTIC_RUN_ID=none RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2"
OPENMPI = "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 PMIX_RANK=3"
HYDRA = "PMI_RANK=3 PMI_SIZE=4 MPI_LOCALNRANKS=2 MPI_LOCALRANKID=1"
MVAPICH = "MV2_COMM_WORLD_RANK=3 MV2_COMM_WORLD_SIZE=4 MV2_COMM_WORLD_LOCAL_RANK=1"
RECORDED = {
    "torchrun": (f"{ELASTIC} {MASTER}", "torchrun", (3, 4, 1), FROM_VARIABLES),
    "torchrun below srun": (f"{ELASTIC} {MASTER} {SLURM}", "torchrun", (3, 4, 1), FROM_VARIABLES),
    "Kubeflow, torch policy": (
        f"PET_NNODES=2 PET_NPROC_PER_NODE=2 {ELASTIC} {MASTER}",
        "torchrun",
        (3, 4, 1),
        FROM_VARIABLES,
    ),
    "PyTorchJob": (f"RANK=3 WORLD_SIZE=4 {MASTER}", "variables", (3, 4, None), FROM_VARIABLES),
    "submitit's export": (
        f"RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 {MASTER} {SLURM}",
        "variables",
        (3, 4, 1),
        FROM_VARIABLES,
    ),
    "Open MPI": (OPENMPI, "mpirun", (3, 4, 1), None),
    "Open MPI with an address": (f"{OPENMPI} {MASTER}", "mpirun", (3, 4, 1), FROM_VARIABLES),
    "Open MPI below SLURM": (f"{OPENMPI} {SLURM}", "mpirun", (3, 4, 1), None),
    "MPICH": (HYDRA, "mpirun", (3, 4, 1), None),
    "MVAPICH": (MVAPICH, "mpirun", (3, 4, 1), None),
    "PMI without local ranks": ("PMI_RANK=3 PMI_SIZE=4", "mpirun", (3, 4, None), None),
    "srun --mpi=pmix": (f"{SLURM} PMIX_RANK=5", "srun with PMI", (5, 6, 1), FROM_SLURM),
    "srun --mpi=pmi2": (f"{SLURM} PMI_RANK=5 PMI_SIZE=6", "srun with PMI", (5, 6, 1), FROM_SLURM),
    "srun": (SLURM, "srun", (5, 6, 1), FROM_SLURM),
    "srun with WORLD_SIZE": (f"{SLURM} WORLD_SIZE=6", "srun", (5, 6, 1), FROM_SLURM),
    "srun with an address": (
        f"{SLURM} {MASTER}",
        "srun",
        (5, 6, 1),
        ("10.0.0.7", 2345, FROM_SLURM[2]),
    ),
    "PMIx alone": ("PMIX_RANK=3", "PMIx", (3, None, None), None),
}


def _parse(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split())


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_variables(case: str) -> None:
    text, name, numbers, address = RECORDED[case]
    variables = _parse(text)
    launcher = find_launcher(variables)
    assert launcher is not None
    assert launcher.name == name == detect_launcher(variables)
    assert read_rank(launcher, variables) == LaunchedRank(*numbers)
    assert find_address(launcher, variables) == address
    assert is_multi_process(variables)


def test_every_row_is_recorded() -> None:
    rows = {find_launcher(_parse(text)) for text, *_ in RECORDED.values()}
    incomplete = [row for row in LAUNCHERS if row.marks in (("WORLD_SIZE",), ("LOCAL_RANK",))]
    assert rows | set(incomplete) == set(LAUNCHERS)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n[01-03,7]", "n01"), ("a,b[1-2]", "a"), ("gpu5", "gpu5"), ("x[3]y", "x3y")],
)
def test_first_host_of_a_list(nodes: str, host: str) -> None:
    variables = {**_parse(SLURM), "SLURM_STEP_NODELIST": nodes}
    launcher = find_launcher(variables)
    assert launcher is not None
    address = find_address(launcher, variables)
    assert address is not None
    assert address[0] == host


def test_no_launcher_and_a_shell_on_a_compute_node() -> None:
    assert detect_launcher({}) == "none"
    assert not is_multi_process({})
    assert not is_multi_process({"SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "1", "PMI_RANK": "0"})
