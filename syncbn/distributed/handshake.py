"""Agreement of all ranks on backend, GPUs and network interface, before a process group exists.

Each rank publishes a report in the job's store and reads all of them. All ranks derive the same
layout, or raise the same error.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from syncbn.distributed.interfaces import (
    find_interface,
    find_source_address,
    interface_address,
    is_loopback,
)

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
#: Address of an interface that does not exist.
ABSENT = "absent"
# The store ends with rank 0, after an error too.
_SECONDS_TO_READ = 5.0


class RankReport(NamedTuple):
    """Facts of one rank.

    Attributes:
        host: host name.
        local_rank: index on the host; None if the launcher does not set it.
        gpus: UUIDs of the visible GPUs.
        backend: requested backend, or None.
        interface: value of GLOO_SOCKET_IFNAME, or empty.
        address: IPv4 address of that interface, or else the one that reaches rank 0's host; empty
            without any, ABSENT if the interface does not exist.
    """

    host: str
    local_rank: int | None
    gpus: Sequence[str]
    backend: str | None
    interface: str
    address: str


class JobLayout(NamedTuple):
    """Agreement of the ranks.

    Attributes:
        backend: backend of the process group.
        local_rank: index of this rank on its host.
        shares_gpus: True if the job has GPUs, but not one for each rank.
        interface: network interface for Gloo; None for Gloo's own choice.
        description: interface, address and their source, for error messages.
    """

    backend: str
    local_rank: int
    shares_gpus: bool
    interface: str | None
    description: str


def report_rank(
    environ: Mapping[str, str], local_rank: int | None, backend: str | None, address: str
) -> RankReport:
    """Return the report of this rank.

    Args:
        environ: environment variables.
        local_rank: index on this host, or None.
        backend: requested backend, or None.
        address: name or address of rank 0's host.
    """
    count = torch.cuda.device_count()
    gpus = [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
    interface = environ.get(GLOO_INTERFACE, "")
    first, *_ = interface.split(",")
    if first and first not in (name for _, name in socket.if_nameindex()):
        own = ABSENT
    else:
        own = interface_address(first) if first else find_source_address(address)
    return RankReport(socket.gethostname(), local_rank, gpus, backend, interface, own)


def publish(store: dist.Store, rank: int, size: int, timeout: timedelta, value: str) -> None:
    """Publish a value of this rank, and wait for the values of all ranks.

    The number of requests of a rank does not grow with the number of ranks.

    Args:
        store: store of these ranks and this call alone.
        rank: rank of this process.
        size: number of ranks.
        timeout: time limit.
        value: value of this rank.

    Raises:
        TimeoutError: ranks did not arrive; the message lists them.
    """
    store.set(f"value/{rank}", value)
    if store.add("arrived", 1) == size:
        store.set("complete", "")
    deadline = time.monotonic() + timeout.total_seconds()
    interval = 1e-3
    # Not store.wait, which blocks the store for other threads of this process.
    while not store.check(["complete"]):
        if time.monotonic() > deadline:
            missing = [other for other in range(size) if not store.check([f"value/{other}"])]
            raise TimeoutError(
                f"rank {rank} of {size} waited {timeout.total_seconds():g} s for ranks {missing}"
            )
        time.sleep(interval)
        interval = min(2 * interval, 0.1)


def read_values(store: dist.Store, size: int) -> list[str]:
    """Return the values that all ranks have published, in rank order."""
    return [text.decode() for text in store.multi_get([f"value/{rank}" for rank in range(size)])]


def agree(
    store: dist.Store,
    rank: int,
    size: int,
    timeout: timedelta,
    report: RankReport,
    cpu_backend: str,
) -> JobLayout:
    """Exchange reports and return the layout; every rank must call this function.

    Args:
        store: store of the job.
        rank: rank of this process.
        size: number of ranks.
        timeout: time limit.
        report: facts of this rank.
        cpu_backend: backend if some rank has no unshared GPU.

    Raises:
        RuntimeError: ranks did not arrive.
        ValueError: ranks requested different backends, a rank has no unshared GPU for NCCL, or
            Gloo's interface cannot reach the other hosts.
    """
    try:
        publish(store, rank, size, timeout, json.dumps(report))
    except TimeoutError as error:
        raise RuntimeError(
            f"{error}; every rank of the job must call init_process_group, and reach the store of "
            "rank 0"
        ) from None
    reports = [RankReport(*json.loads(text)) for text in read_values(store, size)]
    store.add("read", 1)
    try:
        return _derive_layout(rank, reports, cpu_backend)
    except ValueError:
        deadline = time.monotonic() + _SECONDS_TO_READ
        while rank == 0 and store.add("read", 0) < size and time.monotonic() < deadline:
            time.sleep(0.01)
        raise


def _derive_layout(rank: int, reports: list[RankReport], cpu_backend: str) -> JobLayout:
    report = reports[rank]
    local_ranks = _count_local_ranks(reports)
    shared = _describe_shared_gpu(reports, local_ranks)
    names = [r.backend for r in reports]
    if len(firsts := dict.fromkeys(names)) > 1:
        listed = ", ".join(f"{name or 'None'} on rank {names.index(name)}" for name in firsts)
        raise ValueError(f"got backends {listed}; expected the same one on every rank")
    backend = report.backend or (cpu_backend if shared else "nccl")
    if backend == "nccl" and shared:
        raise ValueError(f"{shared}; start at most one rank per GPU, or use backend 'gloo'")
    has_gpus = any(r.gpus for r in reports)
    interface, description = None, "all ranks are on one host"
    if backend == "gloo" and len({r.host for r in reports}) > 1:
        interface, description = _choose_interface(rank, reports)
    shares_gpus = has_gpus and backend != "nccl" and report.backend is None
    return JobLayout(backend, local_ranks[rank], shares_gpus, interface, description)


def _count_local_ranks(reports: list[RankReport]) -> list[int]:
    """Return the local rank of every rank, counted by host where the launcher sets none."""
    seen: Counter[str] = Counter()
    local_ranks = []
    for report in reports:
        counted = seen[report.host]
        local_ranks.append(counted if report.local_rank is None else report.local_rank)
        seen[report.host] += 1
    return local_ranks


def _describe_shared_gpu(reports: list[RankReport], local_ranks: list[int]) -> str:
    """Return the first rank without an unshared GPU, as a text; or an empty text."""
    owners: dict[str, int] = {}
    for rank, (report, local_rank) in enumerate(zip(reports, local_ranks, strict=True)):
        # With a single visible GPU, the launcher assigned it.
        index, count = (local_rank if len(report.gpus) > 1 else 0), len(report.gpus)
        if index >= count:
            place = f"local rank {local_rank} (rank {rank} on {report.host})"
            return f"no GPU for {place}: {count} visible"
        owner = owners.setdefault(report.gpus[index], rank)
        if owner != rank:
            return f"ranks {owner} and {rank} on {report.host} share a GPU"
    return ""


def _choose_interface(rank: int, reports: list[RankReport]) -> tuple[str | None, str]:
    """Return Gloo's interface for several hosts, and its description.

    By default, Gloo binds to the address of the host name: 127.0.1.1 on Debian, or a bridge of
    containers. Its ranks then wait for several timeouts.
    """
    own = reports[rank]
    problems = _find_unreachable(reports)
    if problems:
        raise ValueError(
            f"Gloo cannot connect the hosts: {'; '.join(problems)}; set {GLOO_INTERFACE} on each "
            "host to the name of an interface that reaches the other hosts"
        )
    if own.interface:
        return own.interface, f"interface {own.interface} ({own.address}, from {GLOO_INTERFACE})"
    address, target = own.address, "rank 0"
    if is_loopback(address):  # on the host of rank 0, or without a route to it
        others = (r.address for r in reports if r.host != own.host and not is_loopback(r.address))
        target = next(others, "")
        address = find_source_address(target) if target else ""
    interface = find_interface(address) if address else ""
    source = f"{address or 'no address'}, the route to {target or 'other hosts'}"
    return interface or None, f"interface {interface or 'unknown'} ({source})"


def _find_unreachable(reports: list[RankReport]) -> list[str]:
    """Return descriptions of interfaces of GLOO_SOCKET_IFNAME that cannot reach other hosts."""
    problems: list[str] = []
    hosts: dict[str, str] = {}
    for report in reports:
        if not report.interface:
            continue
        place = f"{report.interface} on {report.host}"
        owner = hosts.setdefault(report.address, report.host)
        if report.address == ABSENT:
            problems.append(f"{place} does not exist")
        elif not report.address:
            continue  # only IPv6, or another system than Linux
        elif is_loopback(report.address):
            problems.append(f"{place} is the loopback interface ({report.address})")
        elif owner != report.host:
            problems.append(f"{place} has the address {report.address}, as has {owner}")
    return sorted(set(problems))
