"""Data-parallel, sharded and pipelined training on the transports equals one process's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import Pool, Ranks
from tests.transports import SUITE

_STEPS = 3
sgd: Callable[..., torch.optim.Optimizer] = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
adam: Callable[..., torch.optim.Optimizer] = partial(torch.optim.Adam, lr=0.1)


def network() -> Any:
    """Return a network whose last layer has fewer rows than the group has ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def batch(step: int) -> Tensor:
    """Return the whole batch of a step, which two and three ranks can share equally."""
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(step)).double()


def share(x: Tensor) -> Tensor:
    """Return this rank's part of a batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def loss(net: Any, x: Tensor) -> Tensor:
    error: Tensor = net(x) - x.sum(1, keepdim=True)
    return error.square().mean()


def train(net: Any, optimizer: torch.optim.Optimizer, take: Callable[[Tensor], Tensor]) -> None:
    """Take some steps, each on a selected part of a batch."""
    for step in range(_STEPS):
        optimizer.zero_grad()
        loss(net, take(batch(step))).backward()
        optimizer.step()


def trained_alone(optimizer: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
    """Return the parameters that one process gets from whole batches."""
    net = network()
    train(net, optimizer(net.parameters()), lambda x: x)
    return values(net)


def values(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def gradients(net: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


def compare(answers: Sequence[list[Tensor]], expected: list[Tensor], atol: float = 1e-12) -> None:
    """Compare the results of all ranks."""
    for answer in answers:
        torch.testing.assert_close(answer, expected, atol=atol, rtol=0)


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


# On one MPI only: every rank takes seconds to import the sharding packages.
@pytest.fixture(params=[name for name in SUITE if name != "mpich"])
def two(request: pytest.FixtureRequest, pool: Pool) -> Ranks:
    return pool(2, request.param)


def _whole(net: Any) -> list[Tensor]:
    return [parameter.full_tensor().detach() for parameter in net.parameters()]


def _tensor_parallel(rank: int) -> list[Tensor]:
    from torch.distributed.tensor import parallel

    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    net = parallel.parallelize_module(network(), init_device_mesh("cpu", (2,)), plan)
    train(net, sgd(net.parameters()), lambda x: x)
    return _whole(net)


def test_tensor_parallel(two: Ranks) -> None:
    compare(two.run(_tensor_parallel), trained_alone(sgd))


def _pipeline(rank: int) -> list[Tensor]:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    net, x = network(), batch(0)
    stage = PipelineStage([net[:2], net[2:]][rank], rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, 3, loss_fn=lambda y, target: (y - target).square().mean())
    if rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=x.sum(1, keepdim=True))
    return gradients(net)


def test_pipeline(two: Ranks) -> None:
    net = network()
    loss(net, batch(0)).backward()
    both = [gradient for answer in two.run(_pipeline) for gradient in answer]
    compare([both], gradients(net))


def _redistributed(rank: int) -> dict[str, Tensor]:
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    rows = distribute_tensor(batch(0)[:7], mesh, [Shard(0)])
    columns = rows.redistribute(mesh, [Shard(1)])
    everywhere = columns.redistribute(mesh, [Replicate()])
    sums: Any = rows.sum(0)
    product: Any = rows @ rows.T
    assert sums.placements == (Partial("sum"),)
    return {
        "rows": rows.full_tensor(),
        "columns": columns.full_tensor(),
        "everywhere": everywhere.to_local(),
        "sums": sums.redistribute(mesh, [Shard(0)]).full_tensor(),
        "product": product.full_tensor(),
    }


def test_distributed_tensors(two: Ranks) -> None:
    x = batch(0)[:7]
    expected = {"rows": x, "columns": x, "everywhere": x, "sums": x.sum(0), "product": x @ x.T}
    for answer in two.run(_redistributed):
        torch.testing.assert_close(answer, expected)


def _checkpoint(rank: int, folder: str, asynchronous: bool) -> Tensor:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    state = {"weight": distribute_tensor(batch(0), mesh, [Shard(0)]), "steps": 7}
    if asynchronous:
        saved: Any = dcp.async_save(state, checkpoint_id=folder)
        saved.result()
    else:
        dcp.save(state, checkpoint_id=folder)
    weight = distribute_tensor(torch.zeros_like(batch(0)), mesh, [Shard(1)])
    loaded = {"weight": weight, "steps": 0}
    dcp.load(loaded, checkpoint_id=folder)
    assert loaded["steps"] == 7
    return weight.full_tensor()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoint(two: Ranks, tmp_path: Path, asynchronous: bool) -> None:
    import torch.distributed.checkpoint as dcp

    folder = str(tmp_path / "checkpoint")
    alone = torch.zeros_like(batch(0))
    for weight in two.run(_checkpoint, folder, asynchronous):
        assert torch.equal(weight, batch(0))
    dcp.load({"weight": alone}, checkpoint_id=folder, no_dist=True)
    assert torch.equal(alone, batch(0))
