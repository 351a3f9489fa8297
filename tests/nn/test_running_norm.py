"""RunningNorm: statistics of a stream over ranks, and the interface of other libraries."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import syncbn
from tests import running_norm_stream
from tests.device import seeded
from tests.ranks import Pool, Ranks


def close(actual: Tensor, expected: Tensor, bound: float = 1e-12) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=bound, atol=bound)


def stream(shape: tuple[int, ...] = (5,), updates: int = 4) -> list[Tensor]:
    generator = seeded(0)
    return [
        torch.randn(2, i, *shape, generator=generator, dtype=torch.float64) * 3 + 1e3
        for i in range(updates)
    ]


@pytest.mark.parametrize("shape", [5, (2, 3), ()])
def test_statistics_of_the_stream(shape: Any) -> None:
    norm = syncbn.RunningNorm(shape)
    batches = stream(norm.shape)
    for batch in batches:
        norm.update(batch)
    whole = torch.cat([batch.flatten(0, 1) for batch in batches])
    close(norm.mean, whole.mean(0))
    close(norm.var, whole.var(0, correction=0))
    close(norm.std, whole.std(0, correction=0))
    assert norm.count == len(whole)
    y = norm(batches[3])
    close(y, (batches[3] - whole.mean(0)) / (whole.std(0, correction=0) + 1e-2), 1e-10)
    close(norm.inverse(y), batches[3])
    assert norm(batches[3].half()).dtype == torch.float16


def test_until_freezes_and_evaluation_does_not_learn() -> None:
    norm = syncbn.RunningNorm(2, until=10)
    for _ in range(3):
        norm.update(torch.ones(6, 2))
    assert norm.count == 12
    norm = syncbn.RunningNorm(2).eval()
    norm.update(torch.ones(6, 2))
    assert norm.count == 0
    assert norm.var.tolist() == [1, 1]
    close(norm(torch.ones(1, 2)), torch.full((1, 2), 1 / 1.01), 1e-7)


def test_clip_and_mask() -> None:
    norm = syncbn.RunningNorm(1, clip=2.0)
    x = torch.tensor([[1.0], [3.0], [1e9]])
    norm.update(x, torch.tensor([True, True, False]))
    assert norm.mean.tolist() == [2]
    assert norm(x).flatten()[2] == 2.0


class Baselines:
    """The published formulas of baselines' RunningMeanStd, for one process."""

    def __init__(self, epsilon: float = 1e-4, shape: tuple[int, ...] = ()) -> None:
        self.mean, self.var, self.count = torch.zeros(shape), torch.ones(shape), epsilon

    def update(self, x: Tensor) -> None:
        mean, var, n = x.mean(0), x.var(0, correction=0), x.shape[0]
        total, delta = self.count + n, mean - self.mean
        m2 = self.var * self.count + var * n + delta**2 * self.count * n / total
        self.mean, self.var, self.count = self.mean + delta * n / total, m2 / total, total


def _learn_with_prior(rank: int) -> dict[str, Tensor]:
    norm = syncbn.RunningNorm(3, prior_count=1e-4)
    for batch in stream((3,)):
        norm.update(batch.flatten(0, 1)[rank::3])
    return norm.state_dict()


def test_prior_counts_once_over_ranks(three_ranks: Ranks) -> None:
    """A common fault of running normalizers: a prior per rank."""
    expected = Baselines(shape=(3,))
    expected.mean, expected.var = expected.mean.double(), expected.var.double()
    for batch in stream((3,))[1:]:
        expected.update(batch.flatten(0, 1))
    for state in three_ranks.run(_learn_with_prior):
        close(state["mean"], expected.mean, 1e-11)
        close(state["var"], expected.var, 1e-9)


def test_killed_and_resumed_stream_over_ranks(pool: Pool, tmp_path: Path) -> None:
    """Bit for bit, as without the kill."""
    updates, whole, killed = 400, tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    pool(3, "gloo").run(running_norm_stream.learn, whole, updates)
    state = running_norm_stream.run_stream(killed, updates, 50.0)
    assert running_norm_stream.largest_error(state, updates) <= 1e-12
    torch.testing.assert_close(torch.load(whole / "part3.pt"), state, rtol=0, atol=0)


def test_copies_learn_on() -> None:
    norm = syncbn.RunningNorm(3)
    norm.update(torch.randn(4, 3))
    for clone in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        x = torch.randn(5, 3)
        clone.update(x)
        assert clone.count == 9
        assert norm.count == 4


def _learn_nan(rank: int) -> list[Any]:
    norm = syncbn.RunningNorm(1)
    norm.update(torch.ones(2, 1))
    try:
        norm.update(torch.tensor([[float("nan") if rank == 1 else 1.0]]))
    except ValueError as error:
        return [str(error), norm.count.item()]
    return []


def test_nan_is_an_error_on_every_rank(three_ranks: Ranks) -> None:
    for message, count in three_ranks.run(_learn_nan):
        assert "got NaN or infinities on some rank; expected finite samples" in message
        assert count == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1.0}, "got eps -1.0; expected a finite number of at least 0"),
        ({"clip": float("nan")}, "got clip nan"),
        ({"prior_count": -1.0}, "got prior_count -1.0"),
        ({"process_group": "rank"}, "got process group 'rank'; expected 'world'"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        syncbn.RunningNorm(3, **options)


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.ones(2, 4), None, r"got samples of shape \(2, 4\) and torch.float32; expected a"),
        (torch.ones(()), None, r"got samples of shape \(\) and torch.float32"),
        (torch.ones(2, 3).int(), None, "and torch.int32; expected a floating tensor"),
        (torch.ones(2, 3), torch.ones(3) > 0, r"got a mask of shape \(3,\) and torch.bool; expe"),
        (torch.ones(2, 3), torch.ones(2), "torch.float32; expected torch.bool"),
    ],
)
def test_bad_samples(x: Tensor, mask: Tensor | None, message: str) -> None:
    norm = syncbn.RunningNorm(3)
    with pytest.raises(ValueError, match=message):
        norm.update(x, mask)
    assert norm.count == 0


def test_empty_update_keeps_the_prior() -> None:
    norm = syncbn.RunningNorm(3, prior_count=1e-4)
    norm.update(torch.empty(0, 3))
    torch.testing.assert_close(norm.var, torch.ones(3).double())


def test_half_precision_models_keep_exact_statistics() -> None:
    norm = syncbn.RunningNorm(1)
    norm.update(torch.randn(1000, 1))
    mean = norm.mean.clone()
    model = torch.nn.Sequential(norm).to(torch.bfloat16)
    assert norm.count == 1000
    assert torch.equal(norm.mean, mean)
    assert model(torch.randn(2, 1).bfloat16()).dtype == torch.bfloat16


def _learn_in_pairs(rank: int) -> list[Any]:
    norm = syncbn.RunningNorm(1, process_group=[[0, 1], [2]])
    norm.update(torch.full((1, 1), float(rank)))
    clone = pickle.loads(pickle.dumps(norm))
    message = ""
    if rank < 2:
        with pytest.raises(RuntimeError) as error:
            clone.update(torch.ones(1, 1))
        message = str(error.value)
    clone.process_group = None
    clone.update(torch.ones(1, 1))
    return [norm.mean.item(), clone.count.item(), message]


def test_group_of_some_ranks(three_ranks: Ranks) -> None:
    results = three_ranks.run(_learn_in_pairs)
    assert [(mean, count) for mean, count, _ in results] == [(0.5, 5), (0.5, 5), (2, 4)]
    assert "lost its process group of the ranks [0, 1]; set the attribute" in results[0][2]
