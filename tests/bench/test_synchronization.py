"""Messages of a training step, and their predicted time."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from syncbn.bench.networks import NETWORKS
from syncbn.bench.synchronization import list_messages, predict_seconds
from syncbn.distributed import collectives
from tests.ranks import Pool


def _record_messages(rank: int, name: str) -> tuple[list[int], list[int]]:
    """Return the predicted messages, and the messages of a step in both directions."""
    network = syncbn.convert_sync_batchnorm(NETWORKS[name]())
    sent: list[int] = []
    start = collectives.start_all_reduce

    def record(vector: torch.Tensor, group: dist.ProcessGroup) -> dist.Work | None:
        sent.append(vector.numel())
        return start(vector, group)

    with patch.object(collectives, "start_all_reduce", record):
        network(torch.randn(2, 3, 32, 32)).sum().backward()
    return list_messages(network), sent


def test_messages_are_those_of_a_step(pool: Pool) -> None:
    for predicted, sent in pool(2, "gloo").run(_record_messages, "resnet20"):
        assert len(sent) == 38
        assert sorted(predicted) == sorted(sent)


def test_times_are_interpolated() -> None:
    seconds = {1: 1.0, 11: 2.0, 111: 4.0}
    assert predict_seconds([1, 6, 11, 61], seconds) == pytest.approx(1 + 1.5 + 2 + 3)
    assert predict_seconds([211], seconds) == pytest.approx(6)  # with the last slope
    assert list_messages(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())) == [8, 8]
