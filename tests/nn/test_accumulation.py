"""Running statistics of a step of several micro-batches."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.device import seeded
from tests.ranks import Ranks

pytestmark = pytest.mark.layers


def _micro_batches(rank: int, step: int) -> list[Tensor]:
    generator = seeded(10 * step + rank)
    sizes = [2, 0, 3 + rank]
    return [torch.randn(n, 3, 4, generator=generator, dtype=torch.float64) + n for n in sizes]


def _train(rank: int) -> list[dict[str, Tensor]]:
    results = []
    for momentum in (0.3, None):
        layer = syncbn.SyncBatchNorm1d(3, momentum=momentum, dtype=torch.float64)
        for step in range(2):
            with syncbn.accumulate_statistics(nn.Sequential(layer)):
                for x in _micro_batches(rank, step):
                    layer(x).sum().backward()
                if step == 0:
                    assert layer.num_batches_tracked == 0
        results.append(dict(layer.named_buffers()))
    return results


def test_running_statistics_match_the_union_of_micro_batches(two_ranks: Ranks) -> None:
    expected = []
    for momentum in (0.3, None):
        whole = nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
        for step in range(2):
            parts = [x for rank in range(2) for x in _micro_batches(rank, step)]
            whole(torch.cat(parts))
        expected.append(dict(whole.named_buffers()))
    for actual in two_ranks.run(_train):
        torch.testing.assert_close(actual, expected)


def test_outputs_and_gradients_are_unchanged() -> None:
    x = torch.randn(4, 3)
    results = []
    for context in (nullcontext, syncbn.accumulate_statistics):
        layer, leaf = syncbn.SyncBatchNorm(3), x.clone().requires_grad_()
        with context(layer):
            y = layer(leaf)
            y.square().sum().backward()
        results.append([y, leaf.grad, *layer.buffers()])
    torch.testing.assert_close(*results)


def test_exception_leaves_running_statistics_unchanged() -> None:
    layer = syncbn.SyncBatchNorm(3)
    before = {name: t.clone() for name, t in layer.state_dict().items()}

    def fails() -> None:
        with syncbn.accumulate_statistics(layer):
            layer(torch.randn(5, 3))
            layer(torch.randn(5, 4))

    with pytest.raises(ValueError, match="expected 3 channels"):
        fails()
    torch.testing.assert_close(dict(layer.state_dict()), before)
    layer(torch.randn(5, 3))
    assert layer.num_batches_tracked == 1


def test_frozen_and_untracked_layers_are_unchanged() -> None:
    untracked = syncbn.SyncBatchNorm(3, track_running_stats=False)
    frozen = syncbn.SyncBatchNorm(3).eval()
    with syncbn.accumulate_statistics(nn.ModuleList([untracked, frozen])):
        untracked(torch.randn(5, 3)), frozen(torch.randn(5, 3))
    assert frozen.num_batches_tracked == 0


@pytest.mark.parametrize(("flag", "extra"), [(False, True), (True, False)])
def test_layers_without_buffers_are_skipped(flag: bool, extra: bool) -> None:
    """torch.func.replace_all_batch_norm_modules_ removes the buffers; the flag may stay."""
    torch.manual_seed(0)
    norms: Any = [nn.BatchNorm1d(4), nn.BatchNorm1d(4)]
    model: Any = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), *norms))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(model[1], name, None)
    model[1].track_running_stats = flag
    if extra:  # the user's buffer
        for layer in norms:
            layer.register_buffer("mine", torch.zeros(7, device="meta"))
    x = torch.randn(6, 3)
    with syncbn.accumulate_statistics(model):
        for part in x.split(3):
            model(part).sum().backward()
    assert model[2].num_batches_tracked == 1
    assert model[1].running_mean is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.BatchNorm1d(3), "got a BatchNorm1d without synchronized layers"),
        (syncbn.convert_sync_batchnorm(nn.LazyBatchNorm1d()), "run it once before"),
    ],
)
def test_unsupported_models_raise(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), syncbn.accumulate_statistics(model):
        pass


def test_nested_accumulation_raises() -> None:
    layer = syncbn.SyncBatchNorm(3)
    with syncbn.accumulate_statistics(layer):
        with (
            pytest.raises(ValueError, match="already active"),
            syncbn.accumulate_statistics(layer),
        ):
            pass
        layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize(
    "make_copy", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_copies_do_not_accumulate(make_copy: Any) -> None:
    """The end of accumulation resets the original alone."""
    layer = syncbn.SyncBatchNorm(3)
    with syncbn.accumulate_statistics(layer):
        layer(torch.randn(4, 3))
        clone = make_copy(layer)
    before = int(clone.num_batches_tracked)  # a shallow copy shares the buffer
    clone(torch.randn(4, 3))
    assert clone.num_batches_tracked == before + 1
    with syncbn.accumulate_statistics(clone):
        clone(torch.randn(4, 3))
    assert clone.num_batches_tracked == before + 2
