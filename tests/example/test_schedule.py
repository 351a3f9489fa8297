"""Learning-rate schedule and optimizer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from optimizer import build_sgd
from schedule import Schedule, build_schedule
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from tests.example.support import composed

SGD = replace(composed().optimizer, lr=0.1, lr_batch=None, warmup_epochs=0, weight_decay=0.5)


def torch_rates(make: type[LRScheduler], steps: int, **settings: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    scheduler = make(optimizer, **settings)  # type: ignore[arg-type]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedule_equals_torch_schedulers() -> None:
    """The expected values come from torch's own warm-up and cosine."""
    schedule = Schedule(peak=0.3, warmup_steps=4, total_steps=24)
    warmup = torch_rates(LinearLR, 4, start_factor=1 / 4, end_factor=1.0, total_iters=3)
    cosine = torch_rates(CosineAnnealingLR, 21, T_max=20)
    assert [schedule(step) for step in range(25)] == pytest.approx(warmup + cosine, abs=1e-12)
    assert schedule(24) == pytest.approx(0, abs=1e-15)


def test_rate_scales_with_the_global_batch() -> None:
    scaled = replace(SGD, lr_batch=256, warmup_epochs=1.5)
    for cfg, peak, warmup in ((scaled, 0.025, 15), (SGD, 0.1, 0)):
        schedule = build_schedule(cfg, steps_per_epoch=10, epochs=3, global_batch=64)
        assert schedule == Schedule(peak=peak, warmup_steps=warmup, total_steps=30)


@pytest.mark.parametrize(("everything", "decaying"), [(False, 2), (True, 5)])
def test_norm_and_bias_do_not_decay_by_default(everything: bool, decaying: int) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Linear(3, 4))
    frozen = nn.BatchNorm2d(2).requires_grad_(False)
    cfg = replace(SGD, decay_norm_and_bias=everything)
    first, second = build_sgd(nn.Sequential(net, frozen), cfg).param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.5, 0)
    assert (len(first["params"]), len(second["params"])) == (decaying, 5 - decaying)
    assert first["nesterov"]


def test_nesterov_without_momentum_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"nesterov=true: got momentum 0"):
        build_sgd(nn.Linear(2, 2), replace(SGD, momentum=0.0))
