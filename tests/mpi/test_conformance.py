"""All collectives of torch.distributed over each MPI; Gloo as a comparison."""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.mpi import conformance
from tests.mpi.conformance_calls import COLLECTIVES
from tests.mpi.conformance_cases import HALVES
from tests.ranks import Pool, Ranks
from tests.transports import MPIS

Op: Any = dist.ReduceOp  # torch's stubs lack its members


@pytest.mark.parametrize(
    ("transport", "name"), [*product(MPIS, COLLECTIVES), *product(["gloo"], conformance.GLOO)]
)
def test_collective(pool: Pool, transport: str, name: str) -> None:
    answers = pool(3, transport).run(conformance.run, transport, name)
    failures = [failure for failures in answers for failure in failures]
    assert not failures, f"{len(failures)} calls failed, such as\n" + "\n".join(failures[:12])


def _pass_barriers(rank: int) -> list[tuple[float, float]]:
    times = []
    for async_op in (False, True):
        time.sleep(0.03 * rank)
        arrived = time.monotonic()
        work: Any = dist.barrier(async_op=async_op)
        if async_op:
            work.wait()
        times.append((arrived, time.monotonic()))
    return times


def test_barrier_waits_for_all_ranks(three_mpi_ranks: Ranks) -> None:
    for times in zip(*three_mpi_ranks.run(_pass_barriers), strict=True):
        assert min(left for _, left in times) >= max(arrived for arrived, _ in times)


def _sum_halves(rank: int, dtype: torch.dtype) -> list[float]:
    """Return 1 + 1 + large - large, where large hides a single 1 in this dtype."""
    large = 2 / torch.finfo(dtype).eps
    ours = torch.ones(3, dtype=dtype)
    ours[rank] = large
    outputs = [ours.clone(), ours.clone(), ours[:1].clone(), ours[:1].clone()]
    dist.all_reduce(outputs[0])
    dist.reduce(outputs[1], dst=0)
    dist.reduce_scatter(outputs[2], list(ours.split(1)))
    dist.reduce_scatter_single(outputs[3], ours)
    if rank != 0:
        del outputs[1]
    return [value - large for value in torch.cat(outputs).tolist()]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_sums_are_rounded_once(three_mpi_ranks: Ranks, dtype: torch.dtype) -> None:
    """Gloo rounds after every addition."""
    for rest in three_mpi_ranks.run(_sum_halves, dtype):
        assert rest == [2.0] * len(rest)


def _min_max_with_nan(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    nan, infinite = float("nan"), float("inf")
    ours = [
        [nan, 1.0, 2.0, -0.5, -infinite, 3.0],
        [1.0, -nan, 2.0, -0.25, infinite, nan],
        [2.0, 3.0, nan, -4.0, 0.0, infinite],
    ][rank]
    largest, smallest = torch.tensor(ours, dtype=dtype), torch.tensor(ours, dtype=dtype)
    dist.all_reduce(largest, Op.MAX)
    dist.all_reduce(smallest, Op.MIN)
    return largest.float(), smallest.float()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_min_and_max_propagate_nan(three_mpi_ranks: Ranks, dtype: torch.dtype) -> None:
    """Like torch.maximum; Gloo, NCCL and plain MPI drop it, MPI not on every rank."""
    nan, infinite = float("nan"), float("inf")
    for largest, smallest in three_mpi_ranks.run(_min_max_with_nan, dtype):
        expected = torch.tensor([nan, nan, nan, -0.25, infinite, nan])
        torch.testing.assert_close(largest, expected, equal_nan=True)
        expected = torch.tensor([nan, nan, nan, -4.0, -infinite, nan])
        torch.testing.assert_close(smallest, expected, equal_nan=True)


def _random_sums(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(numel, generator=generator) for numel in (1, 3, 100, 10_000, 300_000)]
    for tensor in tensors:
        dist.all_reduce(tensor)
    return tensors


def test_all_ranks_receive_identical_bits(three_mpi_ranks: Ranks) -> None:
    for tensors in zip(*three_mpi_ranks.run(_random_sums), strict=True):
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)


def _leaf_tensors(rank: int) -> list[list[float]]:
    leaves = [torch.full((3,), float(rank), requires_grad=True) for _ in range(5)]
    dist.all_reduce(leaves[0], Op.AVG)
    dist.broadcast(leaves[1], 2)
    dist.all_gather([leaves[2]] * 3, torch.full((3,), 5.0))
    dist.reduce_scatter_single(leaves[3], torch.full((9,), float(rank)), Op.AVG)
    dist.all_to_all_single(leaves[4], torch.full((3,), float(rank)))
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)
    return [leaf.tolist() for leaf in leaves]


def test_leaf_tensors_are_filled_in_place(three_mpi_ranks: Ranks) -> None:
    """Gloo cannot average leaf tensors."""
    expected = [[1.0] * 3, [2.0] * 3, [5.0] * 3, [1.0] * 3, [0.0, 1.0, 2.0]]
    assert three_mpi_ranks.run(_leaf_tensors) == [expected] * 3


def _lazily_negated(rank: int) -> list[Any]:
    numbers = torch.tensor([complex(3, rank + 1)])
    negated = numbers.conj().imag
    assert negated.is_neg()
    assert negated.is_contiguous()
    received = negated if rank == 1 else torch.zeros(1)
    dist.broadcast(received, 1)
    everywhere = numbers.clone().conj().imag
    dist.all_reduce(everywhere, Op.MAX)
    gathered = [torch.zeros_like(numbers) for _ in range(3)] if rank == 0 else None
    dist.gather(numbers.conj(), gathered)
    return [received.item(), everywhere.item(), *(x.item() for x in gathered or ())]


def test_lazily_negated_tensors_are_resolved(three_mpi_ranks: Ranks) -> None:
    gathered = [3 - 1j, 3 - 2j, 3 - 3j]
    assert three_mpi_ranks.run(_lazily_negated) == [[-2, -1, *gathered], [-2, -1], [-2, -1]]
