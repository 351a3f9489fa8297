from __future__ import annotations

import pytest
import torch
from config import OptimizerConfig
from optimizer import build_sgd
from schedule import Schedule, build_schedule
from torch import nn

SGD = OptimizerConfig(
    lr=0.1,
    lr_batch=None,
    warmup_epochs=0,
    momentum=0.9,
    nesterov=True,
    weight_decay=0.5,
    decay_norm_and_bias=False,
    clip_norm=None,
)


def with_(**changes: object) -> OptimizerConfig:
    return OptimizerConfig(**{**SGD.__dict__, **changes})


def test_schedule_equals_torch_schedulers() -> None:
    """The expected values come from torch's own warm-up and cosine."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 4, 1.0, total_iters=3)
    schedule = Schedule(peak=0.3, warmup_steps=4, total_steps=24)
    for step in range(4):
        assert schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        warmup.step()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(4, 25):
        assert schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        cosine.step()
    assert schedule(24) == pytest.approx(0, abs=1e-15)


def test_rate_scales_with_the_global_batch() -> None:
    scaled = build_schedule(
        with_(lr_batch=256, warmup_epochs=1.5), steps_per_epoch=10, epochs=3, global_batch=64
    )
    assert scaled == Schedule(peak=0.025, warmup_steps=15, total_steps=30)
    fixed = build_schedule(SGD, steps_per_epoch=10, epochs=3, global_batch=64)
    assert fixed == Schedule(peak=0.1, warmup_steps=0, total_steps=30)


@pytest.mark.parametrize(("everything", "decaying"), [(False, 2), (True, 5)])
def test_norm_and_bias_do_not_decay_unless_asked(everything: bool, decaying: int) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Linear(3, 4))
    frozen = nn.BatchNorm2d(2).requires_grad_(False)
    optimizer = build_sgd(nn.Sequential(net, frozen), with_(decay_norm_and_bias=everything))
    first, second = optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.5, 0)
    assert (len(first["params"]), len(second["params"])) == (decaying, 5 - decaying)
    assert first["nesterov"]


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nesterov=true: got momentum 0"):
        build_sgd(nn.Linear(2, 2), with_(momentum=0.0))
