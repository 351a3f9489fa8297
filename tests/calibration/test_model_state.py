"""Model and process state during and after calibration, failures included."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.calibration.context import CalibrationContext
from syncbn.calibration.ranks import Ranks, defer_sigint
from syncbn.calibration.report import LayerReport
from tests.calibration.networks import (
    METHODS,
    distance,
    images,
    layers,
    network,
    run_batch,
    statistics,
)


def model_state(net: nn.Module) -> dict[str, Any]:
    """Return the visible state of a model, without running statistics."""
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
    net = network().train()
    net[3].first.eval()  # type: ignore[union-attr]
    net[0].weight.requires_grad_(False)
    before, old = model_state(net), statistics(net)
    report = syncbn.recalibrate(net, images().split(4), method=method)
    assert model_state(net) == before
    assert distance(statistics(net), old) > 0.1
    report.undo()
    assert distance(statistics(net), old) == 0.0
    assert model_state(net) == before


def randomness() -> list[Any]:
    """Return the next numbers of each generator."""
    return [torch.rand(2).tolist(), random.random(), np.random.rand()]


@pytest.mark.parametrize("method", METHODS)
def test_rng_state_is_preserved(method: Any) -> None:
    class Random:
        def __iter__(self) -> Iterator[Tensor]:
            for x in images().split(4):
                yield x + torch.rand(1).double() + random.random() + np.random.rand()

    net = network()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = randomness()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    syncbn.recalibrate(net, Random(), method=method)
    assert randomness() == expected


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


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1e-3)  # Python calls the handler within some instructions


@pytest.mark.parametrize("fail", [_raise, _interrupt])
@pytest.mark.parametrize("method", METHODS)
def test_failure_restores_model(method: Any, fail: Any) -> None:
    counted = Failing(net := network(), -1, _raise)
    syncbn.recalibrate(net, counted, method=method, forward=run_batch)
    assert counted.events >= 18
    for event in range(1, counted.events + 1, 1 + counted.events // 20):
        net = network().train()
        source = Failing(net, event, fail)
        before, everything_before = statistics(net), model_state(net)
        with pytest.raises((LookupError, KeyboardInterrupt)):
            syncbn.recalibrate(net, source, method=method, forward=run_batch)
        assert distance(statistics(net), before) == 0.0, f"event {event}"
        assert model_state(net) == everything_before, f"event {event}"


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
        _interrupt()
        return real(*args, **kwargs)

    net = network().train()
    before, everything_before = statistics(net), model_state(net)
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        syncbn.recalibrate(net, images().split(8), method=method)
    assert calls
    monkeypatch.undo()
    assert distance(statistics(net), before) == 0.0
    assert model_state(net) == everything_before
    assert torch.is_grad_enabled()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_failure_ends_suspended_passes() -> None:
    """A pass that is suspended when another fails runs its cleanup."""
    ended: list[int] = []

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            try:
                y: Tensor = self.norm(x)
                if x[0, 0] == 3:
                    raise LookupError("the fourth")
                return y
            finally:
                ended.append(int(x[0, 0]))

    batches = [torch.full((2, 2), float(n)) for n in range(6)]
    with pytest.raises(LookupError):
        syncbn.recalibrate(Careful(), batches, forward=run_batch)
    # First the profile; last the first batch of sequential, then its pass up to the fourth.
    assert sorted(ended) == sorted([0, 0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 3])


def test_defer_sigint() -> None:
    done = []

    def work() -> None:
        with defer_sigint():
            _interrupt()
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_calibration_in_thread() -> None:
    results: list[Any] = []
    expected, net = network(), network()
    syncbn.recalibrate(expected, images().split(4))

    def work() -> None:
        results.append(syncbn.recalibrate(net, images().split(4)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(results) == 1
    assert distance(statistics(net), statistics(expected)) == 0.0
