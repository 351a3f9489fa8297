"""Invalid calls over mpi4py raise on every rank, and the group still works."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks

Op: Any = dist.ReduceOp  # torch's stubs lack its members
X = torch.ones(2)
#: Calls that are invalid on every rank, in the world or in a group of this rank only.
INVALID: dict[str, tuple[Callable[[Any], Any], str]] = {
    "MAX of complex numbers": (
        lambda single: dist.reduce(torch.ones(2, dtype=torch.complex64), 0, Op.MAX),
        r"TypeError: reduce: MPI cannot reduce torch.complex64 with MAX",
    ),
    "BAND of floats": (
        lambda single: dist.all_reduce(X, Op.BAND),
        r"TypeError: all_reduce: MPI cannot reduce torch.float32 with BAND",
    ),
    "AVG of booleans": (
        lambda single: dist.reduce_scatter(X[:1] > 0, [X[:1] > 0] * 3, Op.AVG),
        r"TypeError: reduce_scatter: MPI cannot reduce torch.bool with AVG",
    ),
    "SUM of float8": (
        lambda single: dist.all_reduce(X.to(torch.float8_e5m2)),
        r"TypeError: all_reduce: MPI cannot reduce torch.float8_e5m2 with SUM",
    ),
    "all_reduce of a sparse tensor": (
        lambda single: dist.all_reduce(X.to_sparse()),
        r"TypeError: MPI needs dense tensors, got one with layout torch.sparse_coo",
    ),
    "broadcast of a sparse tensor": (
        lambda single: dist.broadcast(X.to_sparse(), 0),
        r"TypeError: MPI needs dense tensors, got one with layout torch.sparse_coo",
    ),
    "too few outputs": (
        lambda single: dist.all_gather([X], X),
        r"ValueError: all_gather: got 1 outputs of torch.float32; expected 3",
    ),
    "outputs of another size": (
        lambda single: dist.all_gather([torch.ones(3)] * 3, X),
        r"ValueError: all_gather: this rank's own parts differ: 3 and 2 elements",
    ),
    "an output of another size": (
        lambda single: dist.all_gather_single(torch.ones(5), X),
        r"ValueError: all_gather_single: got an output of 5 .* expected 6",
    ),
    "an output of another dtype": (
        lambda single: dist.all_gather_single(torch.ones(6).double(), X),
        r"ValueError: all_gather_single: got an output of 6 torch.float64 .* of 2 torch.float32",
    ),
    "too many inputs to reduce": (
        lambda single: dist.reduce_scatter(X, [X] * 4),
        r"ValueError: reduce_scatter: got 4 inputs of torch.float32; expected 3",
    ),
    "an input of another size": (
        lambda single: dist.reduce_scatter_single(X, torch.ones(7)),
        r"ValueError: reduce_scatter_single: got an input of 7 .* expected 6",
    ),
    "too many outputs of a gather": (
        lambda single: dist.gather(X, [X, X], group=single, group_dst=0),
        r"ValueError: gather: got 2 outputs of torch.float32; expected 1",
    ),
    "too many inputs of a scatter": (
        lambda single: dist.scatter(X, [X, X], group=single, group_src=0),
        r"ValueError: scatter: got 2 inputs of torch.float32; expected 1",
    ),
    "empty lists": (
        lambda single: dist.all_to_all([], []),
        r"ValueError: all_to_all: got 0 inputs of no dtype; expected 3",
    ),
    "own parts of different sizes": (
        lambda single: dist.all_to_all([torch.ones(3)] * 3, [X] * 3),
        r"ValueError: all_to_all: this rank's own parts differ: 3 and 2 elements",
    ),
    "rows not divisible by the world size": (
        lambda single: dist.all_to_all_single(torch.ones(4), torch.ones(4)),
        r"ValueError: all_to_all_single: got 4 rows without split sizes; expected a multiple of 3",
    ),
    "splits that do not add up": (
        lambda single: dist.all_to_all_single(torch.ones(3), torch.ones(3), [1, 1, 2], [1, 1, 1]),
        r"ValueError: all_to_all_single: got split sizes \[1, 1, 2\] for 3 rows",
    ),
    "a negative split": (
        lambda single: dist.all_to_all_single(torch.ones(3), torch.ones(3), [4, -1, 0], [1, 1, 1]),
        r"ValueError: all_to_all_single: got split sizes \[4, -1, 0\] for 3 rows",
    ),
    "a zero-dimensional tensor": (
        lambda single: dist.all_to_all_single(torch.ones(()), torch.ones(())),
        r"ValueError: all_to_all_single: got a tensor without dimensions",
    ),
    "a root beyond the last rank": (
        lambda single: dist.broadcast(X, group_src=3),
        r"ValueError: broadcast: got root 3; expected a rank of the group, 0 to 2",
    ),
    "a negative root": (
        lambda single: dist.reduce(X, group_dst=-1),
        r"ValueError: reduce: got root -1; expected a rank of the group, 0 to 2",
    ),
    "a destination beyond the last rank": (
        lambda single: dist.isend(X, group_dst=3),
        r"ValueError: send: got destination 3; expected a rank of the group, 0 to 2",
    ),
    "a negative source": (
        lambda single: dist.irecv(X, group_src=-2),
        r"ValueError: recv: got source -2; expected a rank of the group, 0 to 2",
    ),
    "a negative tag": (
        lambda single: dist.isend(X, group_dst=0, tag=-1),
        r"ValueError: send: got tag -1; expected 0 to \d+",
    ),
}


def _call_all(rank: int) -> dict[str, str]:
    single, _ = dist.new_subgroups_by_enumeration([[0], [1], [2]])
    messages = {}
    for case, (call, _) in INVALID.items():
        try:
            call(single)
        except (TypeError, ValueError) as error:
            messages[case] = f"{type(error).__name__}: {error}"
        values = torch.ones(1)
        dist.all_reduce(values)
        assert values == 3, f"the group does not work after {case}"
    return messages


def test_invalid_call_raises_and_group_works(three_mpi_ranks: Ranks) -> None:
    for messages in three_mpi_ranks.run(_call_all):
        for case, (_, pattern) in INVALID.items():
            assert re.match(pattern, messages.get(case, "accepted")), f"{case}: {messages}"


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


def _mismatches(rank: int) -> list[str]:
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        group = dist.new_group([0, 1, 2])
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)
    messages = []
    for start in (
        lambda: dist.all_reduce(torch.ones(3 if rank == 1 else 2), group=group),
        lambda: dist.all_reduce(X, Op.MAX if rank == 2 else Op.MIN, group=group),
        lambda: dist.broadcast(X.clone(), rank % 2, group=group),
        lambda: dist.barrier(group) if rank else dist.all_reduce(X.clone(), group=group),
    ):
        with pytest.raises(RuntimeError) as caught:
            start()
        messages.append(str(caught.value))
        values = torch.ones(1)
        dist.all_reduce(values, group=group)
        assert values == 3
    dist.all_gather([torch.ones(1 + r) for r in range(3)], torch.ones(1 + rank), group=group)
    dist.destroy_process_group(group)
    return messages


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


def _debug_on_one_rank(rank: int) -> str:
    dist.set_debug_level(dist.DebugLevel.DETAIL if rank == 1 else dist.DebugLevel.OFF)
    try:
        group: Any = dist.new_group([0, 1, 2])
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)
    dist.all_reduce(torch.ones(2), group=group)
    # Longer than an encoded label, with the difference at the end.
    tensors = [torch.ones(2) for _ in range(30)]
    tensors[-1] = torch.ones(2 if rank else 3)
    with pytest.raises(RuntimeError) as caught:
        group.allreduce_coalesced(tensors)
    group.shutdown()
    group.shutdown()
    return str(caught.value)


def test_debug_level_of_one_rank_applies_to_all(three_mpi_ranks: Ranks) -> None:
    for message in three_mpi_ranks.run(_debug_on_one_rank):
        assert message.startswith("the ranks disagree on collective #2")


def test_debug_level_reports_mismatched_collectives(three_mpi_ranks: Ranks) -> None:
    expected = [
        (1, "all_reduce, 3 torch.float32, SUM", "all_reduce, 2 torch.float32, SUM"),
        (2, "all_reduce, 2 torch.float32, MAX", "all_reduce, 2 torch.float32, MIN"),
        (1, "broadcast, 2 torch.float32, root 1", "broadcast, 2 torch.float32, root 0"),
        (0, "all_reduce, 2 torch.float32, SUM", "barrier"),
    ]
    for messages in three_mpi_ranks.run(_mismatches):
        for number, (odd, theirs, others) in enumerate(expected):
            assert messages[number].splitlines() == [
                f"the ranks disagree on collective #{1 + 2 * number}:",
                *(f"  rank {rank}: {theirs if rank == odd else others}" for rank in range(3)),
            ]
