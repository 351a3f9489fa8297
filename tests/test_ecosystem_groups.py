"""Groups that come and go; collectives in autograd and in compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import Pool, Ranks
from tests.transports import MPIS


def _sum(group: Any, value: float) -> float:
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, group=group)
    return tensor.item()


def _subgroups(rank: int) -> list[float]:
    by_enumeration, _ = dist.new_subgroups_by_enumeration([[2, 0], [1]])
    of_one, _ = dist.new_subgroups(group_size=1)
    groups = [by_enumeration, of_one, dist.group.WORLD]
    if rank != 1:  # non-members need not take part
        groups.append(dist.new_group([0, 2], use_local_synchronization=True))
    return [_sum(group, 10.0**rank) for group in groups]


def test_subgroups(three_cpu_ranks: Ranks) -> None:
    assert three_cpu_ranks.run(_subgroups) == [
        [101.0, 1.0, 111.0, 101.0],
        [10.0, 10.0, 111.0],
        [101.0, 100.0, 111.0, 101.0],
    ]


def _number_of_the_next_communicator() -> int:
    from mpi4py import MPI

    communicator = MPI.COMM_WORLD.Dup()
    number: int = communicator.py2f()
    communicator.Free()
    return number


def _come_and_go(rank: int) -> tuple[int, int]:
    before = _number_of_the_next_communicator()
    for number in range(5):
        group: Any = dist.new_group([0, 1, 2])
        tensor = torch.tensor(float(number))
        work: Any = dist.all_reduce(tensor, group=group, async_op=True)
        dist.destroy_process_group(group)
        assert work.is_completed()
        assert tensor == 3 * number
    return before, _number_of_the_next_communicator()


@pytest.mark.parametrize("transport", MPIS)
def test_destroyed_groups_free_their_communicators(pool: Pool, transport: str) -> None:
    for before, after in pool(3, transport).run(_come_and_go):
        assert before == after


def _input(rank: int) -> Tensor:
    return (torch.arange(6.0) + 10 * rank).requires_grad_()


def _loss(output: Tensor, rank: int) -> Tensor:
    return (output.square() * (torch.arange(len(output)) + rank)).sum()


def _differentiated(rank: int) -> dict[str, tuple[Tensor, Tensor | None]]:
    import torch.distributed.nn.functional as F

    calls: dict[str, Callable[[Tensor], Any]] = {
        "all_reduce": F.all_reduce,
        "all_gather": lambda x: torch.cat(F.all_gather(x)),
        "reduce_scatter": lambda x: F.reduce_scatter(torch.empty(2), list(x.chunk(3))),
        "all_to_all_single": lambda x: F.all_to_all_single(torch.empty(6), x),
        "broadcast": lambda x: F.broadcast(x, 1),
    }
    answers = {}
    for name, call in calls.items():
        x = _input(rank)
        output = call(x)
        _loss(output, rank).backward()
        answers[name] = (output.detach(), x.grad)
    return answers


#: The outputs of all ranks from their inputs.
OUTPUTS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "all_reduce": lambda xs: [torch.stack(xs).sum(0)] * 3,
    "all_gather": lambda xs: [torch.cat(xs)] * 3,
    "reduce_scatter": lambda xs: list(torch.stack(xs).sum(0).chunk(3)),
    "all_to_all_single": lambda xs: [torch.cat([x.chunk(3)[i] for x in xs]) for i in range(3)],
    "broadcast": lambda xs: [xs[1]] * 3,
}


def test_differentiated_collectives(three_cpu_ranks: Ranks) -> None:
    answers = three_cpu_ranks.run(_differentiated)
    for name, compute in OUTPUTS.items():
        inputs = [_input(rank) for rank in range(3)]
        outputs = compute(inputs)
        torch.stack([_loss(output, rank) for rank, output in enumerate(outputs)]).sum().backward()
        for rank, x in enumerate(inputs):
            output, gradient = answers[rank][name]
            torch.testing.assert_close(output, outputs[rank].detach())
            torch.testing.assert_close(gradient, torch.zeros(6) if x.grad is None else x.grad)


def _compiled(rank: int) -> list[Tensor]:
    import torch.distributed._functional_collectives as fc

    group: Any = dist.group.WORLD

    def collectives(x: Tensor) -> list[Any]:
        gathered = fc.all_gather_tensor(2 * x, 0, group)
        y = x + 1
        dist.all_reduce(y)
        return [
            fc.all_reduce(x, "avg", group) * 2,
            gathered,
            fc.reduce_scatter_tensor(gathered, "sum", 0, group) + 1,
            fc.all_to_all_single(gathered, None, None, group),
            fc.all_to_all_single(x, [rank + 1] * 2, [1, 2], group),
            fc.broadcast(x, 1, group),
            y - 1,
        ]

    compiled: Any = torch.compile(collectives, fullgraph=True, backend="aot_eager")
    outputs: list[Tensor] = compiled(torch.arange(3.0) + 10 * rank)
    return [output.clone() for output in outputs]


def test_compiled_collectives(pool: Pool) -> None:
    """Over one MPI only: the compiler takes seconds to import on every rank."""
    xs = [torch.arange(3.0), torch.arange(3.0) + 10]
    total, gathered = xs[0] + xs[1], torch.cat([2 * x for x in xs])
    exchanged = [torch.tensor([0.0, 10.0]), torch.tensor([1.0, 2.0, 11.0, 12.0])]
    for rank, outputs in enumerate(pool(2, "openmpi").run(_compiled)):
        expected = [
            total,
            gathered,
            4 * xs[rank] + 1,
            torch.cat([gathered.chunk(2)[rank]] * 2),
            exchanged[rank],
            xs[1],
            total + 1,
        ]
        torch.testing.assert_close(outputs, expected)
