"""Ranks that calibrate together: the same result for any distribution of the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import syncbn
from tests.calibration.networks import (
    EXACT,
    METHODS,
    Stats,
    compute_population_stats,
    distance,
    images,
    layers,
    network,
    partly_frozen,
    run_batch,
    statistics,
)
from tests.calibration.test_methods import BOUND
from tests.ranks import Ranks

#: Samples and batch size of each rank, for two ranks and for three.
SHARES: dict[str, list[list[tuple[int, int]]]] = {
    "equal": [[(12, 4), (12, 4)], [(8, 4), (8, 4), (8, 4)]],
    "batches of other sizes": [[(12, 1), (12, 12)], [(8, 1), (8, 8), (8, 3)]],
    "other numbers of batches": [[(20, 2), (4, 4)], [(2, 2), (21, 3), (1, 1)]],
    "no data on one": [[(24, 5), (0, 1)], [(0, 1), (24, 5), (0, 1)]],
}
# "average" and "ema" need two values per channel in a batch.
CASES = [
    (method, shares)
    for method in METHODS
    for shares in SHARES
    if method not in ("average", "ema") or shares in ("equal", "no data on one")
]
UNEVEN = [(6, 6), (18, 3), (0, 1)]


def _batches(rank: int, shares: list[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    start = sum(samples for samples, _ in shares[:rank])
    samples, batch_size = shares[rank]
    mine = images(dtype=dtype)[start : start + samples]
    return list(mine.split(batch_size)) if samples else []


def _all_batches(shares: list[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    return [batch for rank in range(len(shares)) for batch in _batches(rank, shares, dtype)]


def _equal_bits(results: list[Stats]) -> bool:
    return all(distance(other, results[0]) == 0.0 for other in results)


def _calibrate(
    rank: int, shares: Any, dtype: torch.dtype, method: Any, num_samples: int | None = None
) -> Stats:
    net, batches = network(dtype), _batches(rank, shares, dtype)
    syncbn.recalibrate(net, batches, method=method, num_samples=num_samples)
    return statistics(net)


@pytest.mark.parametrize(("method", "shares"), CASES)
def test_ranks_agree_bitwise(job: Ranks, method: Any, shares: str) -> None:
    parts = SHARES[shares][job.size - 2]
    dtype = torch.float32 if shares == "equal" else torch.float64
    results = job.run(_calibrate, parts, dtype, method)
    assert _equal_bits(results)
    alone = network(dtype)
    syncbn.recalibrate(alone, _all_batches(parts, dtype), method=method)
    assert distance(results[0], statistics(alone)) < BOUND[dtype]


def test_num_samples_is_shared(job: Ranks) -> None:
    parts = [(8, 8), (8, 3), (8, 1)][: job.size]
    results = job.run(_calibrate, parts, torch.float64, "lockstep", 10)
    assert _equal_bits(results)
    numbers = [[5, 5], [4, 3, 3]][job.size - 2]
    used = [images()[8 * rank : 8 * rank + number] for rank, number in enumerate(numbers)]
    assert distance(results[0], compute_population_stats(network(), *used)) < 1e-12


def _wrapped(rank: int, method: Any) -> tuple[Stats, list[str], Tensor]:
    net: Any = partly_frozen()
    net[6] = torch.nn.BatchNorm2d(5).double()  # DDP rejects torch.nn.SyncBatchNorm on CPU
    model = DistributedDataParallel(net)
    mine = _batches(rank, UNEVEN, torch.float64)
    report = syncbn.recalibrate(
        model, mine, method=method, layers=["3", "6"], skip=[net[3].second], forward=run_batch
    )
    found = statistics(net)
    assert model.require_forward_param_sync
    model.train()
    model(images()[rank : rank + 4]).sum().backward()  # still synchronizes
    return found, report.left_alone, net[0].weight.grad


@pytest.mark.parametrize("method", EXACT)
def test_ddp(job: Ranks, method: str) -> None:
    """Rank 1 runs more forwards than rank 0, which broadcasts the buffers in each of DDP's."""
    results = job.run(_wrapped, method)
    net = partly_frozen()
    net[6] = torch.nn.BatchNorm2d(5).double()
    syncbn.recalibrate(net, [images()], layers=["3.first", "6"])
    for found, left_alone, gradient in results:
        assert distance(found, statistics(net)) < 1e-12
        assert left_alone == ["1", "3.second.1", "11"]
        assert torch.equal(gradient, results[0][2])


def _fully_sharded(rank: int, method: Any) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net: Any = network()
    for module in (net[3], net[0], net):
        fully_shard(module, mesh=mesh)
    syncbn.recalibrate(net, _batches(rank, UNEVEN, torch.float64), method=method)
    assert all(p.__class__.__name__ == "DTensor" for p in net.parameters())
    found = statistics(net)
    net.eval()
    net(images()[:4]).sum().backward()
    return [found, net[0].weight.grad.full_tensor()]


@pytest.mark.parametrize("method", [*EXACT, "pooled"])
def test_fully_sharded(job: Ranks, method: Any) -> None:
    results = job.run(_fully_sharded, method)
    assert _equal_bits([found for found, _ in results])
    alone = network()
    syncbn.recalibrate(alone, _all_batches(UNEVEN, torch.float64), method=method)
    assert distance(results[0][0], statistics(alone)) < 1e-12
    alone.eval()
    alone(images()[:4]).sum().backward()
    torch.testing.assert_close(results[0][1], alone[0].weight.grad)


def _calibrate_unsynchronized(rank: int, method: Any) -> tuple[Stats, Any]:
    net, batches = network(), _batches(rank, SHARES["equal"][1], torch.float64)
    net[12].register_module("unused", torch.nn.BatchNorm2d(3).double())
    for layer in layers(net).values():
        layer.running_mean += rank
    before = statistics(net)
    report = syncbn.recalibrate(net, batches, method=method)
    found = statistics(net)
    report.undo()
    assert distance(statistics(net), before) == 0.0
    return found, [(layer.figures(), layer.channels.between.tolist()) for layer in report.layers]


@pytest.mark.parametrize("method", METHODS)
def test_unsynchronized_old_statistics(job: Ranks, method: Any) -> None:
    """Old statistics of local batch norm differ between ranks."""
    results = job.run(_calibrate_unsynchronized, method)
    assert _equal_bits([found for found, _ in results])
    assert results[0][1] == results[1][1]
    alone = network()
    batches = _all_batches(SHARES["equal"][1][: job.size], torch.float64)
    between = syncbn.recalibrate(alone, batches, method=method).between()
    found, figures = results[0]
    found.pop("12.unused")
    assert distance(found, statistics(alone)) < 1e-12
    for (_, ours), expected in zip(figures, between.values(), strict=True):
        assert ours == pytest.approx(expected.tolist())
