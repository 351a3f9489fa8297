"""Calls of every collective on a case: see conformance.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, _coalescing_manager

from tests.mpi.conformance_cases import (
    EVEN,
    LAYOUTS,
    MOVED,
    REDUCED,
    Call,
    Case,
    operations,
    reduced,
)


def _all_reduce(case: Case) -> Iterator[Call]:
    for name, operation in operations(case.dtype):
        if case.dtype.is_complex and name == "PRODUCT":
            continue  # torch refuses it
        tensor = case.input()
        start = partial(dist.all_reduce, tensor, operation, case.group)
        yield Call(start, [tensor], [reduced(name, case.inputs())], name)


def _all_reduce_coalesced(case: Case) -> Iterator[Call]:
    tensors = [case.input(part=part) for part in range(2)]
    calls = [partial(dist.all_reduce, tensor, group=case.group) for tensor in tensors]
    sums = [reduced("SUM", case.inputs(part)) for part in range(2)]
    yield Call(partial(_coalesced, case, calls), tensors, sums, "SUM")


def _reduce(case: Case) -> Iterator[Call]:
    for root, (name, operation) in product(range(case.size), operations(case.dtype)):
        tensor = case.input()
        start = partial(dist.reduce, tensor, op=operation, group=case.group, group_dst=root)
        expected = reduced(name, case.inputs()) if case.rank == root else case.input()
        yield Call(start, [tensor], [expected], name, f"to {root}")


def _reduce_scatter(case: Case) -> Iterator[Call]:
    for name, operation in operations(case.dtype):
        output = case.blank(case.rank)
        start = partial(dist.reduce_scatter, output, case.parts(), operation, case.group)
        yield Call(start, [output], [reduced(name, case.inputs(case.rank, case.rank))], name)


def _reduce_scatter_single(case: Case) -> Iterator[Call]:
    for name, operation in operations(case.dtype):
        output, stack = case.blank(), case.blank_stack().copy_(torch.stack(case.parts()))
        start = partial(dist.reduce_scatter_single, output, stack, operation, case.group)
        yield Call(start, [output], [reduced(name, case.inputs(case.rank))], name)


def _reduce_scatter_coalesced(case: Case) -> Iterator[Call]:
    outputs = [case.blank(), case.blank()]
    tensors = [_concatenated(case.parts()), _concatenated(case.parts()[::-1])]
    calls = [
        partial(dist.reduce_scatter_single, output, tensor, group=case.group)
        for output, tensor in zip(outputs, tensors, strict=True)
    ]
    sums = [reduced("SUM", case.inputs(part)) for part in (case.rank, case.size - 1 - case.rank)]
    yield Call(partial(_coalesced, case, calls), outputs, sums, "SUM")


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(1) if tensor.dim() == 0 else tensor for tensor in tensors])


def _broadcast(case: Case) -> Iterator[Call]:
    for root in range(case.size):
        tensor = case.input() if case.rank == root else case.blank()
        start = partial(dist.broadcast, tensor, group=case.group, group_src=root)
        yield Call(start, [tensor], [case.input(root)], detail=f"from {root}")


def _all_gather(case: Case) -> Iterator[Call]:
    members = range(case.size)
    outputs = [case.blank(member) for member in members]
    start = partial(dist.all_gather, outputs, case.input(number=case.rank), case.group)
    yield Call(start, outputs, [case.input(member, number=member) for member in members])


def _all_gather_single(case: Case) -> Iterator[Call]:
    for detail in ("", "from its own part"):
        output, tensor = case.blank_stack(), case.input()
        if detail:
            tensor = output[case.rank].copy_(tensor)
        start = partial(dist.all_gather_single, output, tensor, case.group)
        yield Call(start, [output], [torch.stack(case.inputs())], detail=detail)


def _all_gather_coalesced(case: Case) -> Iterator[Call]:
    outputs = [_concatenated([case.blank()] * case.size) for _ in range(2)]
    calls = [
        partial(dist.all_gather_single, output, case.input(part=part), case.group)
        for part, output in enumerate(outputs)
    ]
    expected = [_concatenated(case.inputs(part)) for part in range(2)]
    yield Call(partial(_coalesced, case, calls), outputs, expected, detail="concatenated")
    lists = [[case.blank(), case.blank()] for _ in range(case.size)]
    start = partial(_gather_lists, case, lists, [case.input(), case.input(part=1)])
    by_rank = [case.input(member, part) for member in range(case.size) for part in range(2)]
    yield Call(start, [output for outputs in lists for output in outputs], by_rank, detail="lists")


def _gather_lists(case: Case, outputs: Any, tensors: Any, *, async_op: bool) -> list[Any]:
    # The group's method: torch.distributed's function is deprecated.
    options = AllgatherOptions()
    options.asyncOp = async_op
    return [case.group.allgather_coalesced(outputs, tensors, options)]


def _gather(case: Case) -> Iterator[Call]:
    members = range(case.size)
    for root in members:
        outputs = [case.blank(member) for member in members] if case.rank == root else []
        expected = [case.input(member, number=member) for member in members]
        tensor = case.input(number=case.rank)
        start = partial(dist.gather, tensor, outputs, group=case.group, group_dst=root)
        yield Call(start, outputs, expected[: len(outputs)], detail=f"to {root}")


def _scatter(case: Case) -> Iterator[Call]:
    for root in range(case.size):
        output = case.blank(case.rank)
        inputs = case.parts() if case.rank == root else None
        start = partial(dist.scatter, output, inputs, group=case.group, group_src=root)
        yield Call(start, [output], [case.input(root, case.rank, case.rank)], detail=f"from {root}")


def _all_to_all(case: Case) -> Iterator[Call]:
    outputs, inputs, expected = _exchanged(case)
    yield Call(partial(dist.all_to_all, outputs, inputs, case.group), outputs, expected)


def _all_to_all_single(case: Case) -> Iterator[Call]:
    parts = _exchanged(case)
    uneven = case.layout == "uneven"
    output, tensor, expected = map(torch.cat if uneven else torch.stack, parts)
    rows = [[len(part) for part in tensors] if uneven else [] for tensors in parts]
    start = partial(dist.all_to_all_single, output, tensor, rows[0], rows[1], case.group)
    yield Call(start, [output], [expected])


def _exchanged(case: Case) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    # Uneven layout: 2 (i + j) rows from rank i to rank j, none from rank 0 to itself.
    members, rank = range(case.size), case.rank
    return (
        [case.blank(member + rank) for member in members],
        [case.input(part=member, number=rank + member) for member in members],
        [case.input(member, rank, member + rank) for member in members],
    )


def _send_and_recv(case: Case) -> Iterator[Call]:
    output = case.blank()
    start = partial(_send_around_ring, case, case.input(), output)
    yield Call(start, [output], [case.input(_neighbours(case)[1])])


def _send_around_ring(case: Case, tensor: Tensor, output: Tensor, *, async_op: bool) -> list[Any]:
    right, left = _neighbours(case)
    if async_op or case.size == 1:  # a blocking message to the own rank is not allowed
        sent = dist.isend(tensor, group=case.group, group_dst=right)
        return [dist.irecv(output, group=case.group, group_src=left), sent]
    send = partial(dist.send, tensor, group=case.group, group_dst=right)
    recv = partial(dist.recv, output, group=case.group, group_src=left)
    for step in (send, recv) if case.rank == 0 else (recv, send):
        step()
    return []


def _neighbours(case: Case) -> tuple[int, int]:
    return (case.rank + 1) % case.size, (case.rank - 1) % case.size


def _tags(case: Case) -> Iterator[Call]:
    outputs = [case.blank(), case.blank()]
    start = partial(_receive_in_reverse, case, outputs)
    expected = [case.input(_neighbours(case)[1], part) for part in range(2)]
    yield Call(start, outputs, expected)


def _receive_in_reverse(case: Case, outputs: list[Tensor], *, async_op: bool) -> list[Any]:
    group, (right, left) = case.group, _neighbours(case)
    inputs = [case.input(part=tag) for tag in (0, 1)]
    sent = [dist.isend(inputs[tag], group=group, tag=tag, group_dst=right) for tag in (0, 1)]
    received = [dist.irecv(outputs[tag], group=group, tag=tag, group_src=left) for tag in (1, 0)]
    return [*reversed(received), *sent]


def _recv_from_any_rank(case: Case) -> Iterator[Call]:
    others = range(1, case.size) if case.rank == 0 else ()
    outputs = [case.blank() for _ in others]
    expected = [case.input(member) for member in others]
    yield Call(partial(_by_source, case, outputs), outputs, expected)


def _by_source(case: Case, outputs: list[Tensor], *, async_op: bool) -> list[Any]:
    if case.rank != 0:
        dist.send(case.input(), group=case.group, group_dst=0)
    for _ in outputs:
        received = case.blank()
        if async_op:
            work: Any = dist.irecv(received, group=case.group)
            work.wait()
            source = work._source_rank()
        else:
            source = case.members.index(dist.recv(received, group=case.group))
        outputs[source - 1].copy_(received)
    dist.barrier(case.group)  # otherwise a second message could overtake the first of another rank
    return []


def _batch(case: Case) -> Iterator[Call]:
    members = range(case.size)
    outputs = [case.blank() for _ in members]
    messages = [
        dist.P2POp(operation, tensor, group=case.group, group_peer=peer)
        for operation, tensors in ((dist.irecv, outputs), (dist.isend, case.parts()))
        for peer, tensor in enumerate(tensors)
    ]
    expected = [case.input(peer, case.rank) for peer in members]
    yield Call(partial(_batched, messages), outputs, expected)


def _batched(messages: list[dist.P2POp], *, async_op: bool) -> list[Any]:
    return list(dist.batch_isend_irecv(messages))


def _coalesced(case: Case, calls: Sequence[Callable[[], Any]], *, async_op: bool) -> list[Any]:
    with _coalescing_manager(case.group, async_ops=async_op) as manager:
        for call in calls:
            call()
    return list(manager.works)


class Collective(NamedTuple):
    """Generator of a collective's calls, with the supported dtypes and layouts."""

    calls: Callable[[Case], Iterator[Call]]
    dtypes: Sequence[torch.dtype] = MOVED
    layouts: Sequence[str] = EVEN


COLLECTIVES = {
    "all_reduce": Collective(_all_reduce, REDUCED),
    "all_reduce_coalesced": Collective(_all_reduce_coalesced, REDUCED),
    "reduce": Collective(_reduce, REDUCED),
    "reduce_scatter": Collective(_reduce_scatter, REDUCED, tuple(LAYOUTS)),
    "reduce_scatter_single": Collective(_reduce_scatter_single, REDUCED),
    "reduce_scatter_coalesced": Collective(_reduce_scatter_coalesced, REDUCED),
    "broadcast": Collective(_broadcast),
    "all_gather": Collective(_all_gather, layouts=tuple(LAYOUTS)),
    "all_gather_single": Collective(_all_gather_single),
    "all_gather_coalesced": Collective(_all_gather_coalesced),
    "gather": Collective(_gather, layouts=tuple(LAYOUTS)),
    "scatter": Collective(_scatter, layouts=tuple(LAYOUTS)),
    "all_to_all": Collective(_all_to_all, layouts=tuple(LAYOUTS)),
    "all_to_all_single": Collective(_all_to_all_single, layouts=tuple(LAYOUTS)),
    "send and recv": Collective(_send_and_recv),
    "tags": Collective(_tags),
    "recv from any rank": Collective(_recv_from_any_rank),
    "batch_isend_irecv": Collective(_batch),
}
