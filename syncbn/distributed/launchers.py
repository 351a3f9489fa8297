"""The environment that launchers (torchrun, mpirun, srun) set for the processes they start."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

#: World size, set for every process of a job: Open MPI; MPICH and its derivatives; MVAPICH.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
#: Set by srun if it has set up MPI (its option --mpi).
PMI_RANKS = ("PMIX_RANK", "PMI_RANK")

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# The variables that torch requires; without LOCAL_RANK, local ranks are counted by host name.
_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The first variable that is set decides. An mpirun on several nodes of SLURM starts its helpers
# with srun, and its ranks inherit their variables; srun itself sets PMI_SIZE with --mpi=pmi2.
_LAUNCHERS = {
    "TORCHELASTIC_RUN_ID": "torchrun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MPI_LOCALNRANKS": "mpirun",  # MPICH and its derivatives
    "SLURM_STEP_NUM_TASKS": "srun",
    "PMI_SIZE": "mpirun",
}


class LaunchedProcess(NamedTuple):
    """Ranks and store of this process in its job.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: number of processes in the job.
        local_rank: index of this process on its machine.
        local_world_size: number of the job's processes on this machine.
        store: key-value store shared by all ranks of the job.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store: dist.Store


def detect_launcher(environ: Mapping[str, str]) -> str:
    """Return the launcher of this process: "torchrun", "mpirun", "srun" or "none"."""
    return next((name for variable, name in _LAUNCHERS.items() if variable in environ), "none")


def is_multi_process(environ: Mapping[str, str]) -> bool:
    """Return whether the launcher started more than one process."""
    sizes = (*MPI_SIZES, "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    return any(environ.get(name, "1") != "1" for name in sizes)


def has_torchrun_variables(environ: Mapping[str, str]) -> bool:
    """Return whether RANK, WORLD_SIZE or LOCAL_RANK is set."""
    return any(name in environ for name in _TORCHRUN[:3])


def torchrun_process(environ: Mapping[str, str], timeout: timedelta) -> LaunchedProcess:
    """Return ranks and store from torchrun's variables.

    Raises:
        ValueError: a variable is not a number, or out of range.
        RuntimeError: variables are missing.
    """
    missing = [name for name in _REQUIRED if name not in environ]
    if missing:
        present = [name for name in _TORCHRUN if name in environ]
        raise RuntimeError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}; start with "
            "torchrun, which sets them all, or unset them all to run a single process"
        )
    _number(environ, "MASTER_PORT")
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if rank >= world_size:
        raise ValueError(
            f"got RANK={rank} with WORLD_SIZE={world_size}; "
            f"expected a rank from 0 to {world_size - 1}"
        )
    local_rank = _number(environ, "LOCAL_RANK", 0)
    # Default: all ranks on one node. Every rank must choose the same backend.
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", world_size)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    if local_world_size == world_size:
        # The agent's store outlives an attempt and a destroyed group, so old addresses remain in
        # it. Agents of several nodes count attempts differently, so the count is no prefix there.
        attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"syncbn/attempt_{attempt}", store)
        store = dist.PrefixStore(str(store.add(f"joined/{rank}", 1)), store)
    if "LOCAL_RANK" not in environ:
        local_rank, local_world_size = _count_local_ranks(store, rank, world_size)
    return LaunchedProcess(rank, world_size, local_rank, local_world_size, store)


def mpi_world_size(environ: Mapping[str, str]) -> int:
    """Return the number of processes that mpirun or srun started; 1 without either.

    Raises:
        RuntimeError: srun started several processes without MPI.
    """
    sizes = [_number(environ, name) for name in MPI_SIZES if name in environ]
    # An mpirun of one process within a SLURM job inherits SLURM_STEP_NUM_TASKS from the job.
    if max(sizes, default=1) > 1 or "OMPI_COMM_WORLD_SIZE" in environ:
        return max(sizes)
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", 1)
    if tasks > 1 and "RANK" not in environ and not any(name in environ for name in PMI_RANKS):
        raise RuntimeError(
            f"SLURM_STEP_NUM_TASKS={tasks}: srun started several processes without setting up MPI; "
            "use 'srun --mpi=pmix' (or pmi2), or start torchrun once on each node"
        )
    return tasks


def _count_local_ranks(store: dist.Store, rank: int, world_size: int) -> tuple[int, int]:
    """Return local rank and local world size, from the host names of all ranks."""
    host = socket.gethostname()
    store.set(f"host/{rank}", host)
    hosts = [store.get(f"host/{other}").decode() for other in range(world_size)]
    # The largest count, since every rank must choose the same backend.
    return hosts[:rank].count(host), max(Counter(hosts).values())


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in environ and default is not None:
        return default
    text = environ[name]
    if not text.isdigit():
        raise ValueError(f"got {name}={text!r}; expected a non-negative integer")
    return int(text)
