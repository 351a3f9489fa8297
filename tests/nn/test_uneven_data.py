"""Ranks with different numbers of batches: loops, the weighting of losses, and Join."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.nn.parallel import DistributedDataParallel

import syncbn
from tests.device import seeded
from tests.ranks import Pool, Ranks

#: Sizes of the batches of each rank.
SIZES = ([2, 3, 2], [4], [2, 2])


def make_network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*net, nn.Linear(9, 2), nn.BatchNorm1d(2)).double()


def make_batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    generator = seeded(rank)
    return [
        (
            torch.randn(n, 2, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 2, (n,), generator=generator),
        )
        for n in SIZES[rank]
    ]


def train_whole() -> list[Tensor]:
    """Return the state of one process that has the batches of all ranks."""
    net = make_network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    shares = [make_batches(rank) for rank in range(3)]
    for step in range(3):
        batches = [share[step] for share in shares if step < len(share)]
        x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
    return list(net.state_dict().values())


def _train_evenly(rank: int) -> list[Tensor]:
    net = syncbn.convert_sync_batchnorm(make_network())
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, labels in syncbn.even_batches(make_batches(rank)):
        losses = F.cross_entropy(model(x), labels, reduction="none")
        optimizer.zero_grad()
        syncbn.global_mean(losses).backward()
        optimizer.step()
    return list(net.state_dict().values())


def test_loop_over_even_batches_equals_one_process(three_ranks: Ranks) -> None:
    for state in three_ranks.run(_train_evenly):
        torch.testing.assert_close(state, train_whole())


def _train_joined(rank: int, broadcast_buffers: bool) -> list[Tensor]:
    net = syncbn.convert_sync_batchnorm(make_network())
    model = DistributedDataParallel(net, broadcast_buffers=broadcast_buffers)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with Join([syncbn.JoinableModel(model)]):
        for step, (x, labels) in enumerate(make_batches(rank)):
            losses = F.cross_entropy(model(x), labels, reduction="none")
            # Of this step's samples on all ranks; DDP averages over three.
            total = sum(sizes[step] for sizes in SIZES if step < len(sizes))
            optimizer.zero_grad()
            (losses.sum() * 3 / total).backward()
            optimizer.step()
    return list(net.state_dict().values())


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_joined_ranks_equal_one_process(three_ranks: Ranks, broadcast_buffers: bool) -> None:
    for state in three_ranks.run(_train_joined, broadcast_buffers):
        torch.testing.assert_close(state, train_whole())


class WrongLength:
    def __init__(self, batches: list[Any], length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        return iter(self.batches)


def _end_early(rank: int, lengths: list[int], claimed: list[int]) -> str:
    batches = [torch.ones(1)] * lengths[rank]
    try:
        for _ in syncbn.even_batches(WrongLength(batches, claimed[rank])):
            pass
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("lengths", "claimed", "wrong"),
    [([2, 1, 2], [2, 2, 2], 1), ([3, 2, 2], [2, 2, 2], 1), ([0, 2, 0], [0, 2, 0], 2)],
)
def test_loaders_that_end_unexpectedly(
    three_ranks: Ranks, lengths: list[int], claimed: list[int], wrong: int
) -> None:
    for message in three_ranks.run(_end_early, lengths, claimed):
        assert message.startswith(f"{wrong} ranks have no batch, or another number of batches than")


def _join_without_data(rank: int) -> str:
    # The other rank waits until the timeout.
    group = dist.new_group(timeout=timedelta(seconds=1))
    model = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(2), group)
    try:
        with Join([syncbn.JoinableModel(model)]):
            if rank == 0:
                model(torch.randn(3, 2))
    except RuntimeError as error:
        return str(error)
    return ""


def test_rank_without_a_batch_cannot_join(pool: Pool) -> None:
    message = pool(2, "gloo").run(_join_without_data)[1]
    assert "JoinableModel: got a rank without a batch; expected at" in message


def test_no_losses_at_all() -> None:
    with pytest.raises(ValueError, match="got no losses on any rank"):
        syncbn.global_mean(torch.ones(0))
    assert syncbn.global_mean(torch.tensor([1.0, 3.0])) == 2


def test_batches_without_tensors_and_loaders_without_a_length() -> None:
    class Unsized:
        def __len__(self) -> int:
            raise TypeError("an iterable dataset has no length")

        def __iter__(self) -> Any:
            return iter([torch.ones(1)])

    assert list(syncbn.even_batches(Unsized())) == [torch.ones(1)]
    with pytest.raises(ValueError, match="got a batch of type int without tensors; expected a ten"):
        list(syncbn.even_batches([1, 2]))


def _validate_after_join(rank: int) -> None:
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(make_network()))
    with Join([syncbn.JoinableModel(model)]):
        for x, _ in make_batches(rank):
            model(x).sum().backward()
    if rank == 0:
        # Alone: a notification would be an all-reduce.
        model.eval().module(make_batches(0)[0][0])
        assert not model._forward_pre_hooks


def test_validation_sends_nothing(three_ranks: Ranks) -> None:
    three_ranks.run(_validate_after_join)


def _join_ddp_alone(rank: int, throw: bool) -> str:
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(make_network()))
    try:
        with model.join(throw_on_early_termination=throw):
            for x, _ in make_batches(rank):
                model(x).sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def test_join_of_ddp_alone_raises_on_every_rank(three_ranks: Ranks) -> None:
    """Regression: over Gloo, a process aborted when the first rank had run out of data."""
    for message in three_ranks.run(_join_ddp_alone, False):
        assert message.startswith("1 SyncBatchNorm1d(3): got a synchronized layer in Distributed")
        assert "expected Join([syncbn.JoinableModel(ddp)]), or a loop over syncbn.even" in message


def test_join_that_ends_all_ranks_with_the_first_is_supported(three_ranks: Ranks) -> None:
    for message in three_ranks.run(_join_ddp_alone, True):
        assert "exhausted" in message
