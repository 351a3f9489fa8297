"""Ranks that differ or fail: no rank keeps new statistics if another one failed."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.calibration import ranks as calibration_ranks
from syncbn.calibration.report import LayerReport
from tests.calibration.networks import (
    EXACT,
    METHODS,
    distance,
    images,
    interrupt,
    layers,
    network,
    run_batch,
    statistics,
)
from tests.ranks import Ranks

Outcome = tuple[str, bool, float]


def _recalibrate(net: nn.Module, batches: Any, **arguments: Any) -> Outcome:
    """Return the error, whether the statistics are unchanged, and the sum of a later all-reduce."""
    before, message = statistics(net), ""
    try:
        syncbn.recalibrate(net, batches, **arguments)
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
    value = torch.ones(1)
    dist.all_reduce(value)  # no rank remains in a collective
    return message, distance(statistics(net), before) == 0.0, value.item()


class Loader:
    """Batches whose third one fails."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from images().split(4)[:2]
        raise OSError("the disk is gone")


def _fail(rank: int, case: str, method: Any) -> Outcome:
    net: Any = network()
    batches: Any = images().split(4)
    arguments: dict[str, Any] = {"method": method, "forward": run_batch}
    calls = count()

    def hook(module: Any, args: Any) -> None:
        if next(calls) < 3:
            return
        if case == "model":
            raise ArithmeticError("no such number")
        interrupt()

    match case if rank == 1 else "":
        case "loader":
            batches = iter(Loader()) if method == "lockstep" else Loader()
        case "model" | "Ctrl-C":
            layers(net)["3.second.1"].register_forward_pre_hook(hook)
        case "one-shot":
            batches = iter(batches)
        case "name":
            arguments["layers"] = "backbone"
    return _recalibrate(net, batches, **arguments)


ERRORS = {
    "loader": "OSError: the disk is gone",
    "model": "ArithmeticError: no such number",
    "Ctrl-C": "KeyboardInterrupt: ",
    "one-shot": "ValueError: method 'sequential' reads .* got a one-shot tuple_?iterator",
    "name": "ValueError: layers: got 'backbone'",
}
FAILURES = [
    *(("loader", method) for method in METHODS),
    *(("model", method) for method in EXACT),
    *(("Ctrl-C", method) for method in [*EXACT, "pooled"]),
    *(("one-shot", "sequential"), ("name", "lockstep")),
]


@pytest.mark.parametrize(("case", "method"), FAILURES)
def test_error_on_one_rank_ends_all(job: Ranks, case: str, method: str) -> None:
    """The other ranks waited for the timeout of the process group."""
    first, second, *rest = job.run(_fail, case, method)
    other = "RuntimeError: calibration was ended by an error on rank 1; see the output there"
    assert [first, *rest] == [(other, True, job.size)] * (job.size - 1)
    assert re.match(ERRORS[case], second[0])
    assert second[1:] == (True, job.size)


def _interrupt_during_wait(rank: int, method: Any) -> Outcome:
    if rank == 0:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    def run_slowly(model: nn.Module, x: Tensor) -> object:
        time.sleep(0.2 * rank)
        return model(x)

    return _recalibrate(network(), images().split(12), method=method, forward=run_slowly)


@pytest.mark.parametrize("method", EXACT)
def test_interrupt_during_wait_ends_all(pair: Ranks, method: Any) -> None:
    first, second = pair.run(_interrupt_during_wait, method)
    assert first == ("KeyboardInterrupt: ", True, 2.0)
    assert second[0].startswith("RuntimeError: calibration was ended by an error on rank 0")
    assert second[1:] == (True, 2.0)


def _calibrate_without_data(rank: int, method: Any) -> Outcome:
    return _recalibrate(network(), [], method=method)


@pytest.mark.parametrize("method", METHODS)
def test_no_data_on_any_rank(pair: Ranks, method: str) -> None:
    message = "ValueError: got no batches on any rank; expected at least one"
    assert pair.run(_calibrate_without_data, method) == [(message, True, 2.0)] * 2


DIFFERENCES = {
    "a method": "rank 0 has method 'lockstep', but rank 1 has method 'pooled'",
    "a number of samples": "rank 0 has num_samples None, but rank 1 has num_samples 10",
    "a choice": "rank 0 has layer '1' with 6 channels, .*, but rank 1 has layer '3.first.1' with",
    "an epsilon": "rank 0 has layer '6' .* eps 1e-05, .* eps 0.5",
    "a name": "rank 0 has layer '6' .*, but rank 1 has layer '11'",
    "a layer": "rank 0 has no more layers, but rank 1 has layer '13' with",
    "frozen statistics": "rank 0 has '3.second.1' left alone with statistics .*, but rank 1 has "
    "'3.second.1' left",
    "a forward": "reach different layers: some '3.first.1', and some '6'",
}


def _calibrate_differently(rank: int, case: str) -> Outcome:
    net: Any = network().train()
    if case == "frozen statistics":
        net[3].second.eval()
    arguments: dict[str, Any] = {}
    match case if rank == 1 else "":
        case "a method":
            arguments["method"] = "pooled"
        case "a number of samples":
            arguments["num_samples"] = 10
        case "a choice":
            arguments["skip"] = "1"
        case "an epsilon":
            net[6].eps = 0.5
        case "a name":
            net.add_module("later", net._modules.pop("6"))
            arguments["forward"] = lambda net, x: net[:-1](x)
        case "a layer":
            net.append(nn.BatchNorm1d(2).double())
        case "frozen statistics":
            net[3].second[1].running_mean[2] += 1e-9
        case "a forward":
            net[3].forward = lambda x: x
    return _recalibrate(net, images().split(6), **arguments)


@pytest.mark.parametrize("case", DIFFERENCES)
def test_differences_raise(pair: Ranks, case: str) -> None:
    """One rank returned with new statistics while the other one failed, or both were wrong."""
    first, second = pair.run(_calibrate_differently, case)
    assert first == second
    assert re.match(f"ValueError: the ranks (differ: )?{DIFFERENCES[case]}", first[0])
    assert first[1:] == (True, 2.0)


def _interrupt_on_rank_1(rank: int, owner: Any, name: str, when: str) -> Outcome:
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        if rank == 1 and when in ("", args[-1]):
            interrupt()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        return _recalibrate(network(), images().split(6))


def test_interrupt_before_last_exchange_restores_all(pair: Ranks) -> None:
    """The interrupted rank had its old statistics, and the other one the new ones."""
    first, second = pair.run(_interrupt_on_rank_1, LayerReport, "from_stats", "")
    assert first[0].startswith("RuntimeError: calibration was ended by an error on rank 1")
    assert second[0] == "KeyboardInterrupt: "
    assert first[1:] == second[1:] == (True, 2.0)


def test_interrupt_after_last_exchange_restores_none(pair: Ranks) -> None:
    last = "the last exchange"
    results = pair.run(_interrupt_on_rank_1, calibration_ranks.Ranks, "run_on_all_ranks", last)
    assert results == [("", False, 2.0), ("KeyboardInterrupt: ", False, 2.0)]
