"""All-reduces of layers: number, mismatched, absent and dead ranks; all-gathers of objects."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from syncbn.distributed import collectives
from syncbn.distributed.objects import all_gather_objects
from tests.ranks import Pool, RankError, Ranks


def _mismatches(rank: int) -> list[str]:
    model: Any = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(4))
    syncbn.convert_sync_batchnorm(model)
    half = torch.float16 if rank else None
    messages = []
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    for layer, dtype in ((model[rank], None), (model[2 * rank], None), (model[0], half)):
        with pytest.raises(RuntimeError) as caught:
            layer(torch.randn(2, layer.num_features, dtype=dtype))
        messages.append(str(caught.value))
    # Equal layers pass.
    model[0](torch.full((2, 3), float(rank), requires_grad=True)).sum().backward()
    torch.testing.assert_close(model[0].running_mean, torch.full((3,), 0.05))
    dist.set_debug_level(dist.DebugLevel.OFF)
    return messages


def test_mismatched_layers_are_named_at_debug_level(two_ranks: Ranks) -> None:
    differences = (
        "8 elements for 1 SyncBatchNorm1d(3)",
        "10 elements for 2 SyncBatchNorm1d(4)",
        "8 elements for 0 SyncBatchNorm1d(3) forward, torch.float16 input",
    )
    for messages in two_ranks.run(_mismatches):
        for message, last in zip(messages, differences, strict=True):
            assert "the ranks of a synchronized batch norm disagree" in message
            assert "rank 0: 8 elements for 0 SyncBatchNorm1d(3) forward, torch.float32" in message
            assert f"rank 1: {last}" in message


def _absent(rank: int) -> str:
    short_timeout = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    model = nn.Sequential(nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3))
    syncbn.convert_sync_batchnorm(model, short_timeout)
    if rank == 1:
        return ""
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(2, 1, 4))
    return str(caught.value)


def test_absent_rank_is_timeout_with_layer_name(pool: Pool) -> None:
    message = pool(2, "gloo").run(_absent)[0]
    assert message.startswith("1 SyncBatchNorm1d(3) forward, torch.float32 input: the all-reduce")
    assert "on rank 0 of 2" in message


def _dies(rank: int) -> None:
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    if rank == 1:
        os._exit(1)
    model(torch.randn(2, 3))


def test_dead_rank_is_error_with_layer_name(pool: Pool) -> None:
    with pytest.raises(RankError) as caught:
        pool(2, "gloo").run(_dies)
    assert "RuntimeError: 0 SyncBatchNorm1d(3) forward" in str(caught.value)
    assert "rank 1 of 2: died" in str(caught.value)


def _record_all_reduces(rank: int) -> list[tuple[int, torch.dtype]]:
    sizes = []
    start = collectives.start_all_reduce

    def record(vector: torch.Tensor, group: dist.ProcessGroup) -> dist.Work | None:
        sizes.append((vector.numel(), vector.dtype))
        return start(vector, group)

    with patch.object(collectives, "start_all_reduce", record):
        layer = syncbn.SyncBatchNorm2d(5)
        layer(torch.randn(3 * rank, 5, 4, 4, requires_grad=True)).sum().backward()
        layer.eval()(torch.randn(2, 5, 4, 4))
    return sizes


def test_two_all_reduces_per_step(ranks: Ranks) -> None:
    """One forward, one backward, none in evaluation mode; also on a rank with an empty batch."""
    for sizes in ranks.run(_record_all_reduces):
        on_gpu = ranks.transport == "nccl"  # no fingerprints there
        assert sizes == [
            (11 if on_gpu else 12, torch.float64),
            (10 if on_gpu else 12, torch.float64),
        ]


def _run_without_work(rank: int) -> torch.Tensor:
    start = collectives.start_all_reduce

    def synchronize(vector: torch.Tensor, group: dist.ProcessGroup) -> None:
        work = start(vector, group)
        assert work is not None
        work.wait()

    with patch.object(collectives, "start_all_reduce", synchronize):
        layer = syncbn.SyncBatchNorm1d(1, momentum=1.0)
        layer(torch.full((1, 1), float(rank)))
    assert layer.running_mean is not None
    return layer.running_mean


def test_backend_that_returns_no_work(pool: Pool) -> None:
    """Regression: NCCL returns None, since its call has synchronized the stream already."""
    assert [mean.item() for mean in pool(2, "gloo").run(_run_without_work)] == [0.5, 0.5]


def _not_a_member(rank: int) -> str:
    group = dist.new_group([0])
    x, zeros = torch.randn(2, 3), torch.zeros(3)
    if rank == 0:
        syncbn.sync_batch_norm(x, zeros, zeros, training=True, process_group=group)
        return ""
    with pytest.raises(ValueError, match="got process group 'world'; expected a torch"):
        syncbn.sync_batch_norm(x, zeros, zeros, training=True, process_group="world")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank 1 is not in the process group") as caught:
        syncbn.sync_batch_norm(x, zeros, zeros, training=True, process_group=group)
    return str(caught.value)


def test_group_without_this_rank_is_error(two_ranks: Ranks) -> None:
    assert two_ranks.run(_not_a_member)[1]


def _gather(rank: int, values: list[Any]) -> tuple[list[Any], list[Any]]:
    expected = [None] * len(values)
    dist.all_gather_object(expected, values[rank])
    group = dist.new_group([0, 1])
    gathered = all_gather_objects(values[rank])
    within = all_gather_objects(values[rank], group) if rank < 2 else values[:2]
    assert within == values[:2]
    return gathered, expected


@pytest.mark.parametrize("values", [[None] * 3, [{}, {"a": (1, "x" * 5000)}, [0.5, float("inf")]]])
def test_objects_of_all_ranks_are_gathered(values: list[Any], three_ranks: Ranks) -> None:
    for gathered, expected in three_ranks.run(_gather, values):
        assert gathered == expected == values
