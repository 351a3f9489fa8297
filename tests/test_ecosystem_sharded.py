"""Sharded training, tensors and checkpoints equal one process's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.ecosystem import (
    batch,
    compare,
    gradients,
    loss,
    network,
    sgd,
    train,
    trained_alone,
)
from tests.ranks import Pool, Ranks
from tests.transports import SUITE


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
