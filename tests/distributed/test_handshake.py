"""Agreement of ranks, from reports of hosts, GPUs and interfaces that are not here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from syncbn.distributed.handshake import JobLayout, RankReport, agree
from syncbn.distributed.interfaces import (
    find_interface,
    find_source_address,
    interface_address,
    is_loopback,
)


def report(host: str, **facts: Any) -> RankReport:
    plain: dict[str, Any] = {
        "local_rank": None,
        "gpus": [],
        "backend": None,
        "interface": "",
        "address": "",
    }
    return RankReport(host, **{**plain, **facts})


def agree_all(*reports: RankReport, cpu_backend: str = "gloo") -> list[JobLayout]:
    """Return the layouts of all ranks, which share a store."""
    store, size = dist.HashStore(), len(reports)
    with ThreadPoolExecutor(size) as pool:
        ranks = range(size)
        calls = [
            pool.submit(agree, store, rank, size, timedelta(seconds=10), reports[rank], cpu_backend)
            for rank in ranks
        ]
        errors = {str(error) for call in calls if (error := call.exception()) is not None}
        if errors:
            assert len(errors) == 1, errors  # the same on every rank
            raise ValueError(errors.pop())
        return [call.result() for call in calls]


def test_local_ranks_are_counted_by_host() -> None:
    layouts = agree_all(report("a"), report("b"), report("a"), report("b", local_rank=7))
    assert [layout.local_rank for layout in layouts] == [0, 0, 1, 7]


@pytest.mark.parametrize(
    ("gpus", "backend", "shares"),
    [
        ([["A", "B"], ["A", "B"]], "nccl", False),
        # srun --gpus-per-task=1
        ([["A"], ["B"]], "nccl", False),
        ([["A"], ["A"]], "gloo", True),
        ([["A"], []], "gloo", True),
        ([[], []], "gloo", False),
    ],
)
def test_backend_follows_the_gpus_of_the_ranks(
    gpus: list[list[str]], backend: str, shares: bool
) -> None:
    for layout in agree_all(*(report("a", gpus=visible) for visible in gpus)):
        assert (layout.backend, layout.shares_gpus) == (backend, shares)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            [{"backend": "gloo"}, {}],
            "got backends gloo on rank 0, None on rank 1; expected the sam",
        ),
        ([{"gpus": ["A"]}] * 2, "ranks 0 and 1 on a share a GPU; start at most one rank"),
        ([{"gpus": ["A", "B"]}] * 3, r"no GPU for local rank 2 \(rank 2 on a\): 2 visible; start"),
    ],
)
def test_disagreement_is_an_error_on_every_rank(facts: list[dict[str, Any]], message: str) -> None:
    same = {"backend": "nccl"} if "GPU" in message else {}
    with pytest.raises(ValueError, match=message):
        agree_all(*(report("a", **same, **own) for own in facts))


def test_absent_ranks_are_named() -> None:
    with pytest.raises(
        RuntimeError, match=r"rank 0 of 3 waited 0.1 s for ranks \[1, 2\]; every ran"
    ):
        agree(dist.HashStore(), 0, 3, timedelta(seconds=0.1), report("a"), "gloo")


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ("172.17.0.1", "172.17.0.1", "docker0 on b has the address 172.17.0.1, as has a"),
        ("10.0.0.1", "absent", "docker0 on b does not exist"),
        ("10.0.0.1", "127.0.0.1", r"docker0 on b is the loopback interface \(127.0.0.1\)"),
    ],
)
def test_unreachable_interfaces_are_named(first: str, second: str, problem: str) -> None:
    reports = [
        report(host, interface="docker0", address=address)
        for host, address in (("a", first), ("b", second))
    ]
    with pytest.raises(ValueError, match=f"Gloo cannot connect the hosts: {problem}; set GLOO_SOC"):
        agree_all(*reports)


def test_interface_is_the_route_to_the_other_hosts() -> None:
    loopback = interface_address("lo")
    assert loopback == find_source_address("127.0.0.1") == "127.0.0.1"
    assert find_interface(loopback) == "lo"
    assert interface_address("nothing0") == ""
    assert is_loopback("127.0.1.1")
    assert is_loopback("")
    # The host of rank 0 reaches itself by loopback, so it takes the route to another host.
    first, second = agree_all(report("a", address="127.0.1.1"), report("b", address="203.0.113.9"))
    own = find_source_address("203.0.113.9")
    assert first.interface == (find_interface(own) or None)
    assert second.interface is None  # no interface here has the address
    assert "the route to 203.0.113.9" in first.description
    given, _ = agree_all(
        report("a", interface="eth7", address="10.0.0.1"), report("b", address="10.0.0.2")
    )
    assert given.interface == "eth7"
