"""Invalid calls over mpi4py raise on every rank, and the group still works."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks

Op: Any = dist.ReduceOp  # torch's stubs lack its members
X, ROWS = torch.ones(2), torch.ones(3)
ROOT_LISTS = (dist.gather, dist.scatter)
#: Calls that are invalid on every rank, and their errors.
INVALID: list[tuple[partial[Any], str]] = [
    (
        partial(dist.reduce, X.to(torch.cfloat), 0, Op.MAX),
        "MPI cannot reduce torch.complex64 with MAX",
    ),
    (partial(dist.all_reduce, X, Op.BAND), "MPI cannot reduce torch.float32 with BAND"),
    (partial(dist.broadcast, X.to_sparse(), 0), "MPI needs dense tensors, got one with layout"),
    (partial(dist.all_gather, [X], X), "got 1 outputs of torch.float32; expected 3"),
    (partial(dist.all_gather, [ROWS] * 3, X), "this rank's own parts differ: 3 and 2 elements"),
    (partial(dist.all_gather_single, torch.ones(5), X), "got an output of 5 .* expected 6"),
    (partial(dist.reduce_scatter, X, [X] * 4), "got 4 inputs of torch.float32; expected 3"),
    (partial(dist.reduce_scatter_single, X, torch.ones(7)), "got an input of 7 .* expected 6"),
    (partial(dist.gather, X, [X, X], group_dst=0), "got 2 outputs of torch.float32; expected 1"),
    (partial(dist.scatter, X, [X, X], group_src=0), "got 2 inputs of torch.float32; expected 1"),
    (partial(dist.all_to_all, [], []), "got 0 inputs of no dtype; expected 3"),
    (partial(dist.all_to_all, [ROWS] * 3, [X] * 3), "this rank's own parts differ: 3 and 2 elem"),
    (
        partial(dist.all_to_all_single, torch.ones(4), torch.ones(4)),
        "got 4 rows without split sizes; expected a multiple of 3",
    ),
    (
        partial(dist.all_to_all_single, ROWS, ROWS, [4, -1, 0], [1, 1, 1]),
        r"got split sizes \[4, -1, 0\] for 3 rows",
    ),
    (partial(dist.all_to_all_single, X[0], X[0]), "got a tensor without dimensions"),
    (partial(dist.broadcast, X, group_src=3), "got root 3; expected a rank of the group, 0 to 2"),
    (partial(dist.isend, X, group_dst=3), "got destination 3; expected a rank of the group"),
    (partial(dist.irecv, X, group_src=-2), "got source -2; expected a rank of the group"),
    (partial(dist.isend, X, group_dst=0, tag=-1), r"got tag -1; expected 0 to \d+"),
]


def _call_all(rank: int) -> list[tuple[type, str]]:
    single, _ = dist.new_subgroups_by_enumeration([[0], [1], [2]])
    errors = []
    for call, _ in INVALID:
        group = single if call.func in ROOT_LISTS else None  # only the root has lists
        with pytest.raises((TypeError, ValueError)) as caught:
            call(group=group)
        errors.append((caught.type, str(caught.value)))
        values = torch.ones(1)
        dist.all_reduce(values)
        assert values == 3, f"the group does not work after {caught.value}"
    return errors


def test_invalid_call_raises_and_group_works(three_mpi_ranks: Ranks) -> None:
    for errors in three_mpi_ranks.run(_call_all):
        for (call, pattern), (error, message) in zip(INVALID, errors, strict=True):
            name = call.func.__name__.removeprefix("i")  # isend, irecv
            assert re.match(rf"{name} .*#\d+: {pattern}", message)
            assert error is (TypeError if pattern.startswith("MPI") else ValueError)


def _short_send(rank: int) -> str:
    message = ""
    if rank == 0:
        dist.send(torch.ones(1), 1)
    elif rank == 1:
        with pytest.raises(RuntimeError) as caught:
            dist.recv(torch.ones(2), 0)
        message = str(caught.value)
    dist.barrier()
    return message


def test_short_message_is_error(three_mpi_ranks: Ranks) -> None:
    message = three_mpi_ranks.run(_short_send)[1]
    expected = "recv: rank 0 of the group sent 4 bytes; expected 8 for 2 torch.float32"
    assert message == expected


def _reduce_unsigned(rank: int) -> list[list[int]]:
    results = []
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        for op in (Op.SUM, Op.MAX, Op.BXOR):
            values = torch.tensor([rank + 1, 2**15]).to(dtype)
            dist.all_reduce(values, op)
            results.append(values.tolist())
    return results


def test_unsigned_integers_are_reduced(three_mpi_ranks: Ranks) -> None:
    for results in three_mpi_ranks.run(_reduce_unsigned):
        assert results[0] == [6, (3 * 2**15) % 2**16]
        assert results[3::3] == [[6, 3 * 2**15]] * 2
        assert results[1::3] == [[3, 2**15]] * 3
        assert results[2::3] == [[0, 2**15]] * 3


def _mismatches(rank: int) -> list[str]:
    dist.set_debug_level(dist.DebugLevel.DETAIL if rank == 1 else dist.DebugLevel.OFF)
    group: Any = dist.new_group([0, 1, 2])
    dist.set_debug_level(dist.DebugLevel.OFF)
    # Their label is cut, before the difference.
    many = [*(torch.ones(2) for _ in range(30)), torch.ones(2 if rank else 3)]
    messages = []
    for start in (
        lambda: dist.all_reduce(torch.ones(3 if rank == 1 else 2), group=group),
        lambda: dist.all_reduce(X, Op.MAX if rank == 2 else Op.MIN, group=group),
        lambda: dist.broadcast(X.clone(), rank % 2, group=group),
        lambda: dist.barrier(group) if rank else dist.all_reduce(X.clone(), group=group),
        lambda: group.allreduce_coalesced(many),
    ):
        with pytest.raises(RuntimeError) as caught:
            start()
        messages.append(str(caught.value))
        values = torch.ones(1)
        dist.all_reduce(values, group=group)
        assert values == 3
    dist.all_gather([torch.ones(1 + r) for r in range(3)], torch.ones(1 + rank), group=group)
    group.shutdown()
    dist.destroy_process_group(group)  # a second shutdown
    return messages


def test_debug_level_of_one_rank_reports_mismatched_collectives(three_mpi_ranks: Ranks) -> None:
    expected = [
        (1, "all_reduce, 3 torch.float32, SUM", "all_reduce, 2 torch.float32, SUM"),
        (2, "all_reduce, 2 torch.float32, MAX", "all_reduce, 2 torch.float32, MIN"),
        (1, "broadcast, 2 torch.float32, root 1", "broadcast, 2 torch.float32, root 0"),
        (0, "all_reduce, 2 torch.float32, SUM", "barrier"),
    ]
    for *messages, last in three_mpi_ranks.run(_mismatches):
        for number, (message, (odd, label, others)) in enumerate(
            zip(messages, expected, strict=True)
        ):
            assert message.splitlines() == [
                f"the ranks disagree on collective #{1 + 2 * number}:",
                *(f"  rank {rank}: {label if rank == odd else others}" for rank in range(3)),
            ]
        assert last.startswith("the ranks disagree on collective #9:")
