"""Model and process state during and after calibration, failures included."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.calibration.context import CalibrationContext
from syncbn.calibration.ranks import Ranks
from syncbn.calibration.report import LayerReport
from tests.calibration.networks import (
    METHODS,
    Model,
    distance,
    images,
    interrupt,
    layers,
    network,
    require_error,
    run_batch,
    statistics,
)


def model_state(net: nn.Module) -> dict[str, Any]:
    """Return the visible state of a model and of torch, without running statistics."""
    return {
        "training": [module.training for module in net.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in net.modules()],
        "momentum": [layer.momentum for layer in layers(net).values()],
        "buffers": [id(buffer) for buffer in net.buffers()],
        "memory": [buffer.data_ptr() for buffer in net.buffers()],
        "counters": [int(layer.num_batches_tracked) for layer in layers(net).values()],
        "weights": torch.cat([p.detach().flatten() for p in net.parameters()]).tolist(),
        "requires_grad": [p.requires_grad for p in net.parameters()],
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("method", METHODS)
def test_only_running_statistics_change(method: Any) -> None:
    net: Any = network().train()
    net[3].first.eval()
    net[0].weight.requires_grad_(False)
    before, old = model_state(net), statistics(net)
    report = syncbn.recalibrate(net, images().split(4), method=method)
    assert model_state(net) == before
    assert distance(statistics(net), old) > 0.1
    report.undo()
    assert distance(statistics(net), old) == 0.0
    assert model_state(net) == before


@pytest.mark.parametrize("method", METHODS)
def test_rng_state_is_preserved(method: Any) -> None:
    class Random:
        def __iter__(self) -> Iterator[Tensor]:
            for x in images().split(4):
                yield x + torch.rand(1).double() + random.random() + np.random.rand()

    net, found = network(), []
    for calibrates in (False, True):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        if calibrates:
            syncbn.recalibrate(net, Random(), method=method)
        found.append([torch.rand(2).tolist(), random.random(), np.random.rand()])
    assert found[0] == found[1]


class Failing:
    """Batches that fail from the n-th event on; an event is a batch or the forward of a layer."""

    def __init__(self, net: nn.Module, fail_at: int, fail: Callable[[], None]) -> None:
        self.events = 0
        self._fail_at, self._fail = fail_at, fail
        for layer in layers(net).values():
            layer.register_forward_hook(self._count)

    def __iter__(self) -> Iterator[Tensor]:
        for x in images().split(8):
            self._count()
            yield x

    def _count(self, *_: object) -> None:
        self.events += 1
        if 0 < self._fail_at <= self.events:
            self._fail()


def _raise() -> None:
    raise LookupError("injected")


def require_unchanged(net: nn.Module, batches: Any, **options: Any) -> None:
    """Require that an error or Ctrl-C during a calibration changes nothing."""
    before = model_state(net)
    require_error(net, "^injected$|^$", batches, **options)
    assert model_state(net) == before


@pytest.mark.parametrize("fail", [_raise, interrupt])
@pytest.mark.parametrize("method", METHODS)
def test_failure_restores_model(method: Any, fail: Any) -> None:
    counted = Failing(net := network(), -1, _raise)
    syncbn.recalibrate(net, counted, method=method, forward=run_batch)
    assert counted.events >= 18
    for event in range(1, counted.events + 1, 1 + counted.events // 20):
        source = Failing(net := network().train(), event, fail)
        require_unchanged(net, source, method=method, forward=run_batch)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (LayerReport, "from_stats"),
        (Ranks, "all_gather_object"),
        (CalibrationContext, "reduce_stats"),
        (nn.Module, "register_forward_pre_hook"),
        (torch.random, "fork_rng"),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
@pytest.mark.parametrize("method", ["lockstep", "average"])
def test_interrupt_restores_model(
    owner: Any, name: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(owner, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        interrupt()
        return real(*args, **kwargs)

    net = network().train()
    monkeypatch.setattr(owner, name, interrupted)
    require_unchanged(net, images().split(8), method=method)
    assert calls
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_failure_ends_suspended_passes() -> None:
    """A pass that is suspended when another fails runs its cleanup."""
    ended: list[int] = []

    def run(net: Any, x: Tensor) -> None:
        try:
            net.norm(x)
            if x[0, 0] == 3:
                raise LookupError("the fourth")
        finally:
            ended.append(int(x[0, 0]))

    net, batches = (
        Model(run, norm=nn.BatchNorm1d(2)),
        [torch.full((2, 2), 1.0 * n) for n in range(6)],
    )
    with pytest.raises(LookupError):
        syncbn.recalibrate(net, batches, forward=run_batch)
    # First the profile; last the first batch of sequential, then its pass up to the fourth.
    assert sorted(ended) == sorted([0, 0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 3])


def test_calibration_in_thread() -> None:
    expected, net = network(), network()
    syncbn.recalibrate(expected, images().split(4))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(syncbn.recalibrate, net, images().split(4)).result()
    assert distance(statistics(net), statistics(expected)) == 0.0
