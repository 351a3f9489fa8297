"""Ranks that die during a calibration: errors of the remaining ranks."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.calibration import ranks as calibration_ranks
from tests.calibration.networks import distance, images, statistics

_DIED = 3


def _run_forked(folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """Return the results of two forked ranks, None for a dead one."""
    folder.mkdir()
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            try:
                torch.set_num_threads(1)  # a fork has no threads of its parent's OpenMP pool
                store = dist.FileStore(str(folder / "store"), 2)
                limit = timedelta(seconds=15)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
                (folder / str(rank)).write_bytes(pickle.dumps(work(rank)))
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    results = [folder / str(rank) for rank in range(2)]
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in results]


def _small() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2))


def _die_before(exchange: int) -> None:
    """End this rank before one of its exchanges."""
    number = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal number
            number += 1
            if number == exchange:
                os._exit(_DIED)
            return real(*args, **kwargs)

        return call

    for name in ("all_gather_object", "broadcast_first", "all_reduce"):
        setattr(calibration_ranks.Ranks, name, counted(getattr(calibration_ranks.Ranks, name)))


def _calibrate_until_death(rank: int, exchange: int) -> tuple[str, bool]:
    if rank == 1:
        _die_before(exchange)
    net = _small()
    before = statistics(net)
    message = ""
    try:
        syncbn.recalibrate(net, images(dtype=torch.float32).split(8))
    except RuntimeError as error:
        message = str(error)
    return message, distance(statistics(net), before) == 0.0


def test_rank_death_before_each_exchange(tmp_path: Path) -> None:
    """The other rank raised Gloo's message, or returned with new statistics."""
    steps = []
    for exchange in range(1, 30):
        work = partial(_calibrate_until_death, exchange=exchange)
        results = _run_forked(tmp_path / str(exchange), work)
        message, unchanged = results[0]
        if results[1] is not None:
            assert (message, unchanged) == ("", False)
            break
        assert unchanged, exchange
        steps.append(message)
    assert len(steps) >= 8
    assert all("other ranks, then restart all ranks" in s or "of 1: the all-reduce" in s
               or "of 3: the all-reduce" in s for s in steps), steps  # fmt: skip
    assert "calibration failed on rank 0 of 2 in the preparation" in steps[0]
    assert "in the comparison of arguments and layers" in steps[1]
    assert "in the broadcast of the old statistics" in steps[2]
    assert "in the last exchange" in steps[-1]


def _fail_after_death(rank: int, folder: Path) -> str:
    gone = folder / "gone"

    def batches() -> Iterator[Tensor]:
        yield images(4, torch.float32)
        if rank == 1:
            gone.touch()
            os._exit(_DIED)
        while not gone.exists():
            time.sleep(0.01)
        time.sleep(0.2)
        raise LookupError("the disk is gone")

    try:
        syncbn.recalibrate(_small(), batches())
    except Exception as error:
        return repr(error)
    return ""


def test_rank_death_does_not_hide_error(tmp_path: Path) -> None:
    found = _run_forked(tmp_path / "ranks", lambda rank: _fail_after_death(rank, tmp_path))
    assert found == ["LookupError('the disk is gone')", None]
