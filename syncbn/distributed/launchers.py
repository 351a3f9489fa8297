"""Launchers, and the variables that they set for the processes they start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Launcher(NamedTuple):
    """Variables of a launcher.

    Attributes:
        name: name in reports.
        marks: variables that identify the launcher; all of them are set.
        rank: variable of the rank.
        world_size: variable of the number of ranks, or None.
        local_rank: variable of the index of a process on its host, or None.
        address: source of the address and port of rank 0: "variables" (MASTER_ADDR, MASTER_PORT),
            "MPI" (rank 0 broadcasts them), or "SLURM" (host list and job id).
    """

    name: str
    marks: tuple[str, ...]
    rank: str
    world_size: str | None
    local_rank: str | None
    address: str


_TORCH = "RANK", "WORLD_SIZE", "LOCAL_RANK", "variables"
_SRUN = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
_MVAPICH = "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"
_OPENMPI = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"
#: The first row whose marks are set applies. An mpirun on several nodes of SLURM starts its helpers
#: by srun, so its ranks have both sets. srun sets a rank of PMI with --mpi or by default.
LAUNCHERS = (
    Launcher("torchrun", ("TORCHELASTIC_RUN_ID",), *_TORCH),
    Launcher("variables", ("RANK",), *_TORCH),
    Launcher("mpirun", ("OMPI_COMM_WORLD_SIZE",), *_OPENMPI, "MPI"),
    Launcher("mpirun", ("MPI_LOCALNRANKS",), "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI"),
    Launcher("mpirun", ("MV2_COMM_WORLD_SIZE",), *_MVAPICH, "MPI"),
    Launcher("srun with PMI", ("SLURM_STEP_NUM_TASKS", "PMIX_RANK"), *_SRUN, "MPI"),
    Launcher("srun with PMI", ("SLURM_STEP_NUM_TASKS", "PMI_RANK"), *_SRUN, "MPI"),
    Launcher("srun", ("SLURM_STEP_NUM_TASKS",), *_SRUN, "SLURM"),
    Launcher("mpirun", ("PMI_SIZE",), "PMI_RANK", "PMI_SIZE", None, "MPI"),
    Launcher("PMIx", ("PMIX_RANK",), "PMIX_RANK", None, None, "MPI"),
    # Half a set, which is an error.
    Launcher("variables", ("WORLD_SIZE",), *_TORCH),
    Launcher("variables", ("LOCAL_RANK",), *_TORCH),
)


class LaunchedRank(NamedTuple):
    """Rank, world size and local rank of a process in its job.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: number of processes of the job; None if only MPI has it.
        local_rank: index of the process on its host; None if the launcher does not set it.
    """

    rank: int
    world_size: int | None
    local_rank: int | None


def find_launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Return the launcher of this process, or None."""
    return next((row for row in LAUNCHERS if all(mark in environ for mark in row.marks)), None)


def detect_launcher(environ: Mapping[str, str]) -> str:
    """Return the name of this process's launcher, or "none"."""
    launcher = find_launcher(environ)
    return "none" if launcher is None else launcher.name


def is_multi_process(environ: Mapping[str, str]) -> bool:
    """Return whether the launcher started more than one process."""
    launcher = find_launcher(environ)
    if launcher is None:
        return False
    return launcher.world_size is None or environ.get(launcher.world_size, "1") != "1"


def read_rank(launcher: Launcher, environ: Mapping[str, str]) -> LaunchedRank:
    """Return rank, world size and local rank of this process.

    Raises:
        ValueError: a variable is not a number, or out of range.
        RuntimeError: variables are missing.
    """
    names = [name for name in (launcher.rank, launcher.world_size) if name is not None]
    if launcher.address == "variables":
        names += ["MASTER_ADDR", "MASTER_PORT"]
    if missing := [name for name in names if name not in environ]:
        names += [*launcher.marks, str(launcher.local_rank)]
        present = ", ".join(name for name in dict.fromkeys(names) if name in environ)
        starter = "torchrun" if launcher.address == "variables" else launcher.name
        raise RuntimeError(
            f"the environment has {present} but not {', '.join(missing)}; start with {starter}, "
            "which sets them all, or unset them all to run a single process"
        )
    rank = read_number(environ, launcher.rank)
    size = None if launcher.world_size is None else read_number(environ, launcher.world_size)
    if size is not None and rank >= size:
        raise ValueError(
            f"got {launcher.rank}={rank} with {launcher.world_size}={size}; "
            f"expected a rank from 0 to {size - 1}"
        )
    has_local_rank = launcher.local_rank is not None and launcher.local_rank in environ
    local_rank = read_number(environ, str(launcher.local_rank)) if has_local_rank else None
    return LaunchedRank(rank, size, local_rank)


def find_address(launcher: Launcher, environ: Mapping[str, str]) -> tuple[str, int, str] | None:
    """Return address and port of rank 0, and their source; None if only MPI has them.

    Raises:
        ValueError: MASTER_PORT is not a number.
    """
    source, port = "MASTER_ADDR and MASTER_PORT", None
    host = environ.get("MASTER_ADDR")
    if "MASTER_PORT" in environ:
        port = read_number(environ, "MASTER_PORT")
    # The variables of an mpirun's own srun helpers describe another list of hosts.
    if "SLURM_STEP_NUM_TASKS" in launcher.marks and "SLURM_STEP_NODELIST" in environ:
        source = "SLURM_STEP_NODELIST and SLURM_JOB_ID, without MASTER_ADDR and MASTER_PORT"
        host = host or _first_host(environ)
        # Steps of a job differ, and so do jobs that share a node. Below the ephemeral ports.
        job, step = (read_number(environ, f"SLURM_{name}_ID") for name in ("JOB", "STEP"))
        port = 20000 + (16 * job + step) % 12000 if port is None else port
    return None if host is None or port is None else (host, port, source)


def read_number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return the value of a variable.

    Raises:
        ValueError: the value is not a non-negative integer.
    """
    if name not in environ and default is not None:
        return default
    text = environ[name]
    if not text.isdigit():
        raise ValueError(f"got {name}={text!r}; expected a non-negative integer")
    return int(text)


def _first_host(environ: Mapping[str, str]) -> str:
    """Return the first host of a list such as "node[01-03,7]-ib,gpu5"."""
    if environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "localhost"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", environ["SLURM_STEP_NODELIST"]).partition(",")[0]
