"""Report of an all-reduce on the CPU that does not complete.

A rank that waits for a second publishes its all-reduce in the group's store. From these reports
follow a warning after 30 s, and the absent ranks in the message of an error. The store may not
answer either: a query takes another connection and has a time limit. A fast all-reduce sends
nothing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from syncbn.distributed.fingerprint import count_checked
from syncbn.distributed.timeouts import call_with_timeout

_PUBLISH_SECONDS = 1.0
_WARN_SECONDS = 30.0
# A failed rank waits this long for the reports of the other ranks.
_REPORT_SECONDS = 1.5
_STORE_SECONDS = 2.0

T = TypeVar("T")


def wait(work: dist.Work, group: dist.ProcessGroup, label: str) -> None:
    """Wait for an all-reduce; warn on one rank if that takes 30 s.

    Args:
        work: the all-reduce.
        group: its group.
        label: its label, the same on every rank.

    Raises:
        RuntimeError: the transport failed or timed out.
    """
    if _is_done(work, _PUBLISH_SECONDS):
        return
    key, call = str(group.rank()), _name_call(group, label)
    _query_store(group, lambda store: store.set(key, call))
    if not _is_done(work, _WARN_SECONDS - _PUBLISH_SECONDS):
        reports = _collect_reports(group, call, seconds=0)
        if reports is None:
            reason = "the store of the group does not answer: rank 0 may have stopped"
        else:
            reason = _describe_absent(reports, group, call)
        # Of the waiting ranks, one warns.
        if reports is None or reports.index(call) == group.rank():
            warnings.warn(f"{call}: no result after {_WARN_SECONDS:g} s; {reason}", stacklevel=2)
        work.wait()
    _query_store(group, lambda store: store.set(key, ""))


def describe_absent(group: dist.ProcessGroup, label: str) -> str:
    """Return the ranks that have not reached a failed all-reduce, as a text; empty if unknown.

    Args:
        group: group of the all-reduce.
        label: its label.
    """
    call = _name_call(group, label)
    reports = _collect_reports(group, call, _REPORT_SECONDS)
    return "" if reports is None else _describe_absent(reports, group, call)


def _collect_reports(group: dist.ProcessGroup, call: str, seconds: float) -> list[str] | None:
    """Publish the all-reduce of this rank; return the all-reduces that all ranks wait for.

    Args:
        group: group of the all-reduce.
        call: its description.
        seconds: time limit of the wait for the reports of other ranks.

    Returns:
        Descriptions by rank, empty without a report; None without an answer of the store.
    """

    def collect(store: dist.Store) -> list[str]:
        store.set(str(group.rank()), call)
        deadline = time.monotonic() + seconds
        while True:
            reports = _read_reports(store, group.size())
            if reports.count(call) == group.size() or time.monotonic() >= deadline:
                return reports
            time.sleep(0.05)

    return _query_store(group, collect)


def _name_call(group: dist.ProcessGroup, label: str) -> str:
    return f"{label}, all-reduce {count_checked(group) + 1} of the group"


def _is_done(work: dist.Work, seconds: float) -> bool:
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # raises its own error
    return True


def _query_store(group: dist.ProcessGroup, request: Callable[[dist.Store], T]) -> T | None:
    """Return the answer of the group's store; None without one."""

    def ask() -> T:
        store = group.get_group_store().clone()  # type: ignore[attr-defined]  # not in the stub
        return request(dist.PrefixStore("syncbn/stalls", store))

    try:
        return call_with_timeout(ask, _STORE_SECONDS)
    except (RuntimeError, TimeoutError):
        return None


def _read_reports(store: dist.Store, size: int) -> list[str]:
    keys = [str(rank) for rank in range(size)]
    return [store.get(key).decode() if store.check([key]) else "" for key in keys]


def _describe_absent(reports: list[str], group: dist.ProcessGroup, call: str) -> str:
    ranks = dist.get_process_group_ranks(group)
    texts = [
        f"rank {rank} is in {report}" if report else f"rank {rank} has not reached it"
        for rank, report in zip(ranks, reports, strict=True)
        if report != call
    ]
    return "; ".join(texts)
