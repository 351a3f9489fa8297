"""Settings of a job that are known to be slow or wrong, each with its remedy."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

import syncbn
from syncbn.distributed.handshake import GLOO_INTERFACE
from syncbn.distributed.interfaces import interface_address

_SET_BY_SCRIPTS = "launch/torchrun.sh and mpirun.sh set it"


class RankFacts(NamedTuple):
    """Facts of one rank.

    Attributes:
        rank: 0 to world_size - 1.
        host: host name.
        pid: process id.
        device: device of the rank's tensors.
        gpus: number of visible GPUs.
        threads: number of torch's threads.
        cores: cores on which this process may run, as "0,1".
        interface: network interface of Gloo and its address; empty for Gloo's choice.
        versions: versions of torch and syncbn.
        variables: environment variables that change the speed of collectives.
    """

    rank: int
    host: str
    pid: int
    device: str
    gpus: int
    threads: int
    cores: str
    interface: str
    versions: str
    variables: Mapping[str, str]


def describe_rank(info: syncbn.RankInfo, environ: Mapping[str, str]) -> RankFacts:
    """Return the facts of this rank."""
    name = environ.get(GLOO_INTERFACE, "")
    variables = "TORCH_DISTRIBUTED_DEBUG", "MALLOC_MMAP_MAX_"
    # macOS has no affinity.
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return RankFacts(
        info.rank,
        socket.gethostname(),
        os.getpid(),
        str(info.device),
        torch.cuda.device_count(),
        torch.get_num_threads(),
        ",".join(map(str, sorted(affinity))),
        f"{name} ({interface_address(name.partition(',')[0]) or 'no IPv4'})" if name else "",
        f"torch {torch.__version__}, syncbn {syncbn.__version__}",
        {name: environ[name] for name in variables if name in environ},
    )


def explain_backend(
    requested: str | None, backend: str, launcher: str, ranks: Sequence[RankFacts]
) -> str:
    """Return the reason for the backend of the job."""
    if requested is not None:
        return "requested"
    if backend == "nccl":
        return "every rank has a GPU of its own"
    reason = "mpi4py connects the ranks" if backend == "mpi4py" else "no MPI connects the ranks"
    gpus = "not every rank has a GPU of its own" if any(r.gpus for r in ranks) else "no GPUs"
    return f"{gpus}; launcher {launcher}: {reason}"


def find_problems(backend: str, ranks: Sequence[RankFacts]) -> list[str]:
    """Return the problems of a job's settings, each with its remedy.

    Args:
        backend: backend of the job.
        ranks: facts of all ranks.
    """
    problems = []
    if backend != "nccl" and any(rank.gpus for rank in ranks):
        problems.append(
            f"GPUs, but the backend is {backend}: collectives are far slower than over NCCL; start "
            "one rank per GPU"
        )
    for rank in ranks:
        if rank.versions != ranks[0].versions:
            problems.append(
                f"rank {rank.rank} has {rank.versions}, rank 0 has {ranks[0].versions}: install "
                "the same on every host"
            )
    problems += _find_crowded_cores(ranks)
    variables = ranks[0].variables
    if variables.get("TORCH_DISTRIBUTED_DEBUG") == "DETAIL":
        problems.append(
            "TORCH_DISTRIBUTED_DEBUG=DETAIL: every all-reduce is preceded by another one; unset it "
            "for speed"
        )
    is_glibc = platform.libc_ver()[0] == "glibc"
    is_cpu_job = len(ranks) > 1 and ranks[0].device == "cpu"
    if is_cpu_job and is_glibc and variables.get("MALLOC_MMAP_MAX_") != "0":
        problems.append(
            "MALLOC_MMAP_MAX_ is not 0: large tensors are returned to the system and cleared again "
            f"on each use; {_SET_BY_SCRIPTS}"
        )
    return problems


def _find_crowded_cores(ranks: Sequence[RankFacts]) -> list[str]:
    """Return the sets of cores that have fewer cores than threads."""
    problems = []
    for host, cores in dict.fromkeys((rank.host, rank.cores) for rank in ranks):
        sharing = [rank for rank in ranks if (rank.host, rank.cores) == (host, cores)]
        threads, available = sum(rank.threads for rank in sharing), cores.count(",") + 1
        if threads <= available or all(rank.device != "cpu" for rank in sharing):
            continue
        numbers = ", ".join(str(rank.rank) for rank in sharing)
        if len(sharing) > available:
            remedy = "start fewer ranks, or mpirun with --bind-to none if the host has more cores"
        else:
            remedy = f"set OMP_NUM_THREADS={available // len(sharing)}; {_SET_BY_SCRIPTS}"
        problems.append(
            f"ranks {numbers} on {host}: {threads} threads on {available} core(s); {remedy}"
        )
    return problems
