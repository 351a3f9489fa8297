"""Data-parallel training on every transport equals one process on whole batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from tests.ecosystem import (
    adam,
    batch,
    compare,
    loss,
    network,
    sgd,
    share,
    train,
    trained_alone,
    values,
)
from tests.ranks import Ranks

#: Options of DDP, a communication hook or None, and the largest error.
DDP: dict[str, tuple[dict[str, Any], Any, float]] = {
    "defaults": ({}, None, 1e-12),
    "small buckets": ({"bucket_cap_mb": 1e-5, "gradient_as_bucket_view": True}, None, 1e-12),
    "all-reduce hook": ({}, default_hooks.allreduce_hook, 1e-12),
    "float16 hook": ({}, default_hooks.fp16_compress_hook, 2e-3),
    # torch rejects its own hook on a CPU, by its name.
    "bfloat16 hook": (
        {},
        lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket),
        2e-2,
    ),
}


def _ddp(rank: int, name: str) -> list[Tensor]:
    options, hook, _ = DDP[name]
    net = DistributedDataParallel(network(), **options)
    if hook is not None:
        net.register_comm_hook(None, hook)
    train(net, sgd(net.parameters()), share)
    return values(net)


@pytest.mark.parametrize("name", DDP)
def test_data_parallel(three_cpu_ranks: Ranks, name: str) -> None:
    compare(three_cpu_ranks.run(_ddp, name), trained_alone(sgd), DDP[name][2])


def _uneven(rank: int) -> list[Tensor]:
    net = DistributedDataParallel(network())
    optimizer = sgd(net.parameters())
    with net.join():
        for step in range(1 + rank):
            optimizer.zero_grad()
            loss(net, share(batch(step))).backward()
            optimizer.step()
    return values(net)


def test_some_ranks_have_fewer_batches(three_cpu_ranks: Ranks) -> None:
    net = network()
    optimizer = sgd(net.parameters())
    for step in range(3):
        optimizer.zero_grad()
        for part in batch(step).chunk(3)[step:]:
            (loss(net, part) / 3).backward()
        optimizer.step()
    compare(three_cpu_ranks.run(_uneven)[2:], values(net))  # the last rank had them all


def _train_a_matrix(net: Any, rows: slice) -> None:
    optimizer = sgd(net.parameters())
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(step))
        net(x[rows]).square().mean().backward()
        optimizer.step()


def _power_sgd(rank: int) -> list[Tensor]:
    torch.manual_seed(0)
    net = DistributedDataParallel(nn.Linear(32, 32, bias=False))
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=3, start_powerSGD_iter=2)
    net.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    _train_a_matrix(net, slice(rank, rank + 1))
    return values(net)


def test_hook_whose_callbacks_communicate(three_cpu_ranks: Ranks) -> None:
    """PowerSGD keeps a gradient's three largest directions; three samples have no more."""
    torch.manual_seed(0)
    net = nn.Linear(32, 32, bias=False)
    _train_a_matrix(net, slice(None))
    compare(three_cpu_ranks.run(_power_sgd), values(net), atol=1e-5)


def _zero(rank: int) -> list[Tensor]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns

    net = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=0.1)
    train(net, optimizer, share)
    optimizer.consolidate_state_dict(to=1)
    if rank == 1:
        assert len(optimizer.state_dict()["state"]) == len(values(net))
    return values(net)


def test_zero_redundancy_optimizer(three_cpu_ranks: Ranks) -> None:
    compare(three_cpu_ranks.run(_zero), trained_alone(adam))
