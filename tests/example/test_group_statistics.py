"""Running statistics of groups of ranks in evaluations and checkpoints; DDP's broadcast."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import TrainState, capture, restore
from config import NormConfig, NormKind
from group_statistics import merged_statistics
from meter import Meter
from norm import apply_norm, needs_broadcast
from storage import save
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.example.support import checkpoint, fit_rank, tiny
from tests.ranks import Ranks

CPU = torch.device("cpu")


def _make_state(rank: int, group: int) -> TrainState:
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = apply_norm(net, NormConfig(NormKind.group, group), CPU)  # type: ignore[assignment]
    assert any("Evaluations and checkpoints merge" in str(w.message) for w in caught) == (rank == 0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    return TrainState(net, optimizer, torch.amp.GradScaler("cpu", enabled=False), Meter(CPU), 1)


def _train_on_different_data(rank: int, path: Path) -> tuple[dict[str, Tensor], Any]:
    """Train in groups of one; the data of rank 1 have another mean."""
    state = _make_state(rank, 1)
    model = DistributedDataParallel(
        state.net, forward_sync_buffers=needs_broadcast(NormKind.group)
    ).train()
    generator = torch.Generator().manual_seed(rank)
    for _ in range(200):
        model(torch.randn(4, 4, 5, 5, generator=generator) + 10 * rank).sum().backward()
    own = {name: buffer.clone() for name, buffer in state.net.named_buffers()}
    assert own["0.running_mean"].mean().item() == pytest.approx(10 * rank, abs=0.1)
    saved = capture(state)
    if rank == 0:
        save(saved, path)
    for name, buffer in state.net.named_buffers():
        assert torch.equal(buffer, own[name])
    with merged_statistics(state.net):
        evaluated = {name: buffer.clone() for name, buffer in state.net.named_buffers()}
    return own, evaluated


def _resume(rank: int, path: Path) -> dict[str, Tensor]:
    state = _make_state(rank, 1)
    restore(state, path)
    return dict(state.net.named_buffers())


def test_checkpoint_and_evaluation_have_the_statistics_of_all_data(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    """Regression: a checkpoint had the statistics of rank 0's group, mean 0 and variance 1."""
    path = tmp_path / "last.pt"
    results = two_ranks.run(_train_on_different_data, path)
    saved = torch.load(path, weights_only=True)["model"]
    for statistics in (saved, *(evaluated for _, evaluated in results)):
        torch.testing.assert_close(
            statistics["0.running_mean"], torch.full((4,), 5.0), rtol=0.01, atol=0
        )
        torch.testing.assert_close(
            statistics["0.running_var"], torch.full((4,), 26.0), rtol=0.01, atol=0
        )
    # A resumed run continues with each group's own.
    for (own, _), restored in zip(results, two_ranks.run(_resume, path), strict=True):
        torch.testing.assert_close(restored, own, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:norm.group=1")
def test_training_in_groups_resumes_exactly(two_ranks: Ranks, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    common = ["norm=group", "norm.group=1", "dtype=float64"]
    two_ranks.run(
        fit_rank,
        tiny(f"run_dir={whole}", "max_steps=7", *common),
        tiny(f"run_dir={part}", "max_steps=5", *common),
        tiny(f"run_dir={part}", "max_steps=7", "resume=auto", *common),
    )
    got, expected = checkpoint(part), checkpoint(whole)
    torch.testing.assert_close(got["model"], expected["model"], rtol=1e-14, atol=0)
    torch.testing.assert_close(got["ranks"], expected["ranks"], rtol=1e-14, atol=0)
    assert got["ranks"][0]["buffers"] is not None


def _broadcasts(rank: int, kind: str) -> tuple[bool, bool]:
    """Train a step; return whether DDP broadcasts buffers, and whether they are equal on ranks."""
    net: nn.Module = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
    norm = NormConfig(NormKind(kind), 1 if kind == "group" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = apply_norm(net, norm, CPU)
    model = DistributedDataParallel(net, forward_sync_buffers=needs_broadcast(norm.kind))
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        model(torch.randn(3, 1, 4, 4, generator=generator)).sum().backward()
    mean = net.get_buffer("1.running_mean")
    least, most = mean.clone(), mean.clone()
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return bool(model.forward_sync_buffers), torch.equal(least, most)


@pytest.mark.parametrize(
    ("kind", "broadcasts", "equal"),
    [("sync", False, True), ("group", False, False), ("local", True, False)],
)
def test_buffers_are_broadcast_for_local_statistics_only(
    two_ranks: Ranks, kind: str, broadcasts: bool, equal: bool
) -> None:
    """World-wide statistics stay bitwise equal without the broadcast."""
    assert two_ranks.run(_broadcasts, kind) == [(broadcasts, equal)] * 2
