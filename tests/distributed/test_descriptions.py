"""Groups that the ranks describe differently, and the timeout of groups that they create."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from syncbn.distributed import resolve_group
from syncbn.distributed.groups import GroupLike
from tests.ranks import COLLECTIVE_TIMEOUT, Pool, Ranks

SECONDS = 2.0


def _set_timeout(seconds: float) -> None:
    """Change the timeout of the default group, as if init_process_group had set it."""
    assert dist.group.WORLD is not None
    dist.group.WORLD.set_timeout(timedelta(seconds=seconds))


def _convert(rank: int, described: list[list[GroupLike]]) -> list[str]:
    """Convert a layer with each description of this rank; return the errors."""
    errors, began = [], time.monotonic()
    for group in described[rank]:
        try:
            syncbn.convert_sync_batchnorm(nn.BatchNorm1d(2), group)
        except (ValueError, RuntimeError) as error:
            errors.append(str(error))
    assert time.monotonic() - began < COLLECTIVE_TIMEOUT / 2
    return errors


@pytest.mark.parametrize(
    "described",
    [
        [[1], [3], [3]],
        [["node"], [3], [1]],
        [["own", [[0, 1], [2]]], [[[0, 1], [2]], "own"], [[[0, 1], [2]], "own"]],
        [[2], [1], ["node"]],  # one is not valid either
        [[[[0], [1, 2]]], [[[0, 1], [2]]], [[[1, 2], [0]]]],
    ],
    ids=["sizes", "node and size", "order", "no divisor", "lists"],
)
def test_different_descriptions_raise_on_every_rank(
    three_ranks: Ranks, described: list[list[GroupLike]]
) -> None:
    """Regression: ranks created different groups, then one was in a hang past the timeout."""
    first, second, third = three_ranks.run(_convert, described)
    assert len(first) == len(described[0])
    assert first == second == third
    for call, message in enumerate(first):
        assert message.startswith("got different groups on different ranks (call ")
        for rank, groups in enumerate(described):
            group = groups[call]
            text = f"groups of {group}" if isinstance(group, int) else f"{group!r}"
            assert f"\n  rank {rank}: {text}\n" in message


def _layers_in_another_order(rank: int) -> str:
    layers = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    syncbn.convert_sync_batchnorm(layers, [[0, 1], [2]])
    if rank == 2:
        return ""
    with pytest.raises(RuntimeError) as caught:
        layers[rank](torch.randn(3, 2))
    return str(caught.value)


def test_layers_in_another_order_within_a_group(pool: Pool) -> None:
    for rank, message in enumerate(pool(3, "gloo").run(_layers_in_another_order)[:2]):
        assert message.startswith(f"{rank} SyncBatchNorm1d(2) forward, torch.float32 input: this")


def _stall(rank: int) -> list[float]:
    _set_timeout(SECONDS)
    waited = []
    for description in (3, "own", [[0, 1, 2]], [[0, 1], [2]]):
        group = resolve_group(description)
        if group is None:
            continue
        if rank > 0:
            time.sleep(SECONDS + 0.5)
            continue
        began = time.monotonic()
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(1), group=group)
        waited.append(time.monotonic() - began)
    _set_timeout(COLLECTIVE_TIMEOUT)
    return waited


def test_groups_inherit_the_timeout_of_init_process_group(pool: Pool) -> None:
    """Regression: a stalled rank was an error after half an hour."""
    waited = pool(3, "gloo").run(_stall)[0]
    assert len(waited) == 2
    assert all(SECONDS <= seconds < SECONDS + 5 for seconds in waited)


def _convert_half(rank: int) -> str:
    if rank == 0:
        return ""
    _set_timeout(SECONDS)
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        syncbn.convert_sync_batchnorm(nn.BatchNorm1d(2), 1)
    assert SECONDS <= time.monotonic() - began < SECONDS + 5
    return str(caught.value)


def test_rank_without_a_description_is_named_after_the_timeout(pool: Pool) -> None:
    ranks = pool(3, "gloo")
    for message in ranks.run(_convert_half)[1:]:
        assert "  rank 0: no group yet\n  rank 1: groups of 1\n  rank 2: groups of 1\n" in message
        assert "Every rank must pass its model to convert_sync_batchnorm" in message
    ranks.close()  # rank 0 has described fewer groups


def _timeout_over_mpi(rank: int) -> float:
    group = resolve_group([[0, 1], [2]])
    assert isinstance(group, dist.ProcessGroup)
    timeout: timedelta = group._timeout  # type: ignore[attr-defined]
    return timeout.total_seconds()


def test_groups_over_mpi_inherit_the_timeout(pool: Pool) -> None:
    assert pool(3, "openmpi").run(_timeout_over_mpi) == [COLLECTIVE_TIMEOUT] * 3
