"""Ranks that calibrate together: the same result for any distribution of the data."""

from __future__ import annotations

import os
import signal
import threading
import time
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
    distance,
    images,
    layers,
    network,
    run_batch,
    statistics,
)
from tests.calibration.test_exact import BOUND
from tests.ranks import Ranks

#: Samples and batch size of each rank, for two ranks and for three.
SHARES: dict[str, list[list[tuple[int, int]]]] = {
    "equal": [[(12, 4), (12, 4)], [(8, 4), (8, 4), (8, 4)]],
    "batches of other sizes": [[(12, 1), (12, 12)], [(8, 1), (8, 8), (8, 3)]],
    "other numbers of batches": [[(20, 2), (4, 4)], [(2, 2), (21, 3), (1, 1)]],
    "no data on one": [[(24, 5), (0, 1)], [(0, 1), (24, 5), (0, 1)]],
}
Buffers = dict[str, tuple[Tensor, Tensor]]


def _batches(rank: int, shares: list[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    start = sum(samples for samples, _ in shares[:rank])
    samples, batch_size = shares[rank]
    mine = images(dtype=dtype)[start : start + samples]
    return list(mine.split(batch_size)) if samples else []


def _calibrate(
    rank: int, shares: Any, dtype: torch.dtype, method: Any, num_samples: int | None = None
) -> Buffers:
    net = network(dtype)
    batches = _batches(rank, shares, dtype)
    syncbn.recalibrate(net, batches, method=method, num_samples=num_samples)
    return statistics(net)


def _equal_bits(results: list[Buffers]) -> bool:
    return all(distance(other, results[0]) == 0.0 for other in results)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("method", METHODS)
def test_ranks_agree_bitwise(ranks: Ranks, method: Any, dtype: torch.dtype, shares: str) -> None:
    parts = SHARES[shares][ranks.size - 2]
    if method in ("average", "ema") and any(1 in part for part in parts):
        parts = [(samples, 4) for samples, _ in SHARES["equal"][ranks.size - 2]]
    results = ranks.run(_calibrate, parts, dtype, method)
    assert _equal_bits(results)
    alone = network(dtype)
    together = [b for rank in range(ranks.size) for b in _batches(rank, parts, dtype)]
    syncbn.recalibrate(alone, together, method=method)
    assert distance(results[0], statistics(alone)) < BOUND[dtype]


def test_num_samples_is_shared(three_ranks: Ranks) -> None:
    results = three_ranks.run(_calibrate, [(8, 8), (8, 3), (8, 1)], torch.float64, "lockstep", 10)
    assert _equal_bits(results)
    x, alone = images(), network()
    syncbn.recalibrate(alone, [x[:4], x[8:11], x[16:19]])
    assert distance(results[0], statistics(alone)) < 1e-12


def _wrapped(rank: int, method: Any) -> Buffers:
    net = network()
    net[6] = torch.nn.BatchNorm2d(5).double()  # DDP rejects torch.nn.SyncBatchNorm on CPU
    model = DistributedDataParallel(net)
    parts = [(18, 3), (6, 6)]
    syncbn.recalibrate(model, _batches(rank, parts, torch.float64), method=method)
    found = statistics(net)
    model.train()
    model(images()[rank : rank + 4]).sum().backward()  # still synchronizes
    weight: Any = net[0].weight
    return {**found, "gradient": (weight.grad, torch.ones(1))}


@pytest.mark.parametrize("method", EXACT)
def test_ddp(two_ranks: Ranks, method: str) -> None:
    results = two_ranks.run(_wrapped, method)
    assert _equal_bits(results)


def _fully_sharded(rank: int, method: Any) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net: Any = network()
    for module in (net[3], net[0], net):
        fully_shard(module, mesh=mesh)
    syncbn.recalibrate(net, _batches(rank, [(18, 3), (6, 6)], torch.float64), method=method)
    assert all(p.__class__.__name__ == "DTensor" for p in net.parameters())
    found = statistics(net)
    net.eval()
    net(images()[:4]).sum().backward()
    return [found, net[0].weight.grad.full_tensor()]


@pytest.mark.parametrize("method", METHODS)
def test_fully_sharded(two_ranks: Ranks, method: str) -> None:
    results = two_ranks.run(_fully_sharded, method)
    assert _equal_bits([found for found, _ in results])
    alone = network()
    parts = [(18, 3), (6, 6)]
    batches = [b for rank in range(2) for b in _batches(rank, parts, torch.float64)]
    syncbn.recalibrate(alone, batches, method=method)  # type: ignore[arg-type]
    assert distance(results[0][0], statistics(alone)) < 1e-12
    alone.eval()
    alone(images()[:4]).sum().backward()
    torch.testing.assert_close(results[0][1], alone[0].weight.grad)


def _fail_on_one_rank(rank: int, method: Any, where: str) -> tuple[str, bool, list[float]]:
    net = network()
    before = statistics(net)

    def batches() -> Any:
        for number, x in enumerate(images().split(4)):
            if rank == 1 and number == 2 and where == "loader":
                raise OSError("the disk is gone")
            yield x

    calls = [0]

    def fail(module: Any, args: Any) -> None:
        calls[0] += 1
        if rank == 1 and calls[0] >= 4 and where in ("model", "Ctrl-C"):
            raise KeyboardInterrupt if where == "Ctrl-C" else ArithmeticError("no such number")

    layers(net)["3.second.1"].register_forward_pre_hook(fail)
    source = list(images().split(4)) if where != "loader" else batches()
    if method == "sequential" and where == "loader":

        class Again:
            def __iter__(self) -> Any:
                return batches()

        source = Again()
    message = ""
    try:
        syncbn.recalibrate(net, source, method=method, forward=run_batch)
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
    value = torch.ones(1)
    dist.all_reduce(value)  # no rank remains in a collective
    return message, distance(statistics(net), before) == 0.0, value.tolist()


@pytest.mark.parametrize("where", ["loader", "model", "Ctrl-C"])
@pytest.mark.parametrize("method", METHODS)
def test_error_on_one_rank_ends_all(three_ranks: Ranks, method: str, where: str) -> None:
    expected = {
        "loader": "OSError: the disk is gone",
        "model": "ArithmeticError: no such number",
        "Ctrl-C": "KeyboardInterrupt: ",
    }[where]
    others = "RuntimeError: calibration was ended by an error on rank 1; see the output there"
    for rank, (message, unchanged, value) in enumerate(
        three_ranks.run(_fail_on_one_rank, method, where)
    ):
        assert message == (expected if rank == 1 else others)
        assert unchanged
        assert value == [3.0]


def _calibrate_unsynchronized(rank: int, method: Any) -> tuple[Buffers, Any]:
    net, batches = network(), _batches(rank, SHARES["equal"][0], torch.float64)
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
def test_unsynchronized_old_statistics(two_ranks: Ranks, method: Any) -> None:
    """Old statistics of local batch norm differ between ranks."""
    results = two_ranks.run(_calibrate_unsynchronized, method)
    assert _equal_bits([found for found, _ in results])
    assert results[0][1] == results[1][1]
    alone = network()
    batches = [b for rank in range(2) for b in _batches(rank, SHARES["equal"][0], torch.float64)]
    between = syncbn.recalibrate(alone, batches, method=method).between()
    found, figures = results[0]
    found.pop("12.unused")
    assert distance(found, statistics(alone)) < 1e-12
    for (_, ours), expected in zip(figures, between.values(), strict=True):
        assert ours == pytest.approx(expected.tolist())


def _one_shot(rank: int) -> str:
    source: Any = images().split(4)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        syncbn.recalibrate(network(), iter(source) if rank else source, method="sequential")
    return str(caught.value)


def test_one_shot_iterator_on_one_rank(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(_one_shot)
    assert "ended by an error on rank 1" in first
    assert "got a one-shot tuple_iterator" in second


def _interrupt_during_wait(rank: int, method: Any) -> tuple[str, bool, list[float]]:
    net = network()
    before = statistics(net)

    class Slow:
        def __iter__(self) -> Any:
            for x in images().split(8):
                time.sleep(0.3 * rank)
                yield x

    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    if rank == 0:
        timer.start()
    message = ""
    try:
        syncbn.recalibrate(net, Slow(), method=method)
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
    value = torch.ones(1)
    dist.all_reduce(value)
    return message, distance(statistics(net), before) == 0.0, value.tolist()


@pytest.mark.parametrize("method", EXACT)
def test_interrupt_during_wait_ends_all(two_ranks: Ranks, method: Any) -> None:
    first, second = two_ranks.run(_interrupt_during_wait, method)
    assert first == ("KeyboardInterrupt: ", True, [2.0])
    assert second[0].startswith("RuntimeError: calibration was ended by an error on rank 0")
    assert second[1:] == (True, [2.0])


def _calibrate_without_data(rank: int, method: Any) -> str:
    net = network()
    before = statistics(net)
    with pytest.raises(ValueError, match="got no batches on any rank") as caught:
        syncbn.recalibrate(net, [], method=method)
    assert distance(statistics(net), before) == 0.0
    return str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_no_data_on_any_rank(two_ranks: Ranks, method: str) -> None:
    assert len(set(two_ranks.run(_calibrate_without_data, method))) == 1


def _skip_layers_on_one_rank(rank: int) -> str:
    net = network()
    net[3].forward = (lambda x: x) if rank == 1 else net[3].forward
    with pytest.raises(ValueError, match=r"the ranks reach different layers") as caught:
        syncbn.recalibrate(net, images().split(6))
    return str(caught.value)


def test_ranks_reach_different_layers(two_ranks: Ranks) -> None:
    messages = two_ranks.run(_skip_layers_on_one_rank)
    assert messages[0] == messages[1]
    assert "some '3.first.1', and some '6'" in messages[0]
