"""Statistics of the union of several populations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.ranks import Ranks

SIZES = (400, 7, 90)


def _network() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2)).double()


def _state(inputs: Tensor) -> dict[str, Tensor]:
    """Return a state dict whose first layer has the population statistics of the inputs."""
    net: Any = _network()
    net[0].running_mean.copy_(inputs.mean(0))
    net[0].running_var.copy_(inputs.var(0, correction=0))
    net[0].num_batches_tracked.fill_(len(inputs))
    return net.state_dict()  # type: ignore[no-any-return]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_union_of_populations(offset: float) -> None:
    parts = [torch.randn(n, 3, dtype=torch.float64) * (i + 1) + i for i, n in enumerate(SIZES)]
    parts = [part + offset for part in parts]
    merged = syncbn.merge_statistics([_state(part) for part in parts], SIZES)
    whole = torch.cat(parts)
    rtol = 1e-14 if offset == 0 else 1e-11  # the variances of the inputs are no more exact
    torch.testing.assert_close(merged["0.running_mean"], whole.mean(0), rtol=1e-14, atol=1e-14)
    expected = whole.var(0, correction=0)
    torch.testing.assert_close(merged["0.running_var"], expected, rtol=rtol, atol=0)
    assert merged["0.num_batches_tracked"] == sum(SIZES)


def test_result_loads_into_a_model_and_keeps_dtypes() -> None:
    net = _network().float()
    states = [net.state_dict(), _network().state_dict()]
    merged = syncbn.merge_statistics(states, [1, 3])
    assert {name for name in merged if name.startswith("2.")} == {
        "2.running_mean",
        "2.running_var",
        "2.num_batches_tracked",
    }
    assert merged["0.running_var"].dtype == torch.float32
    assert not net.load_state_dict(merged, strict=False).unexpected_keys


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1], "got 2 state dicts and 1 counts"),
        ([1, 0], r"got counts\[1\] = 0; expected a positive"),
        ([-1, 1], r"got counts\[0\] = -1"),
        ([1, math.inf], r"got counts\[1\] = inf"),
        ([1, math.nan], r"got counts\[1\] = nan"),
    ],
)
def test_bad_counts(counts: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        syncbn.merge_statistics([_network().state_dict()] * 2, counts)


def test_state_dicts_that_do_not_match() -> None:
    state, other = _network().state_dict(), _network().state_dict()
    del other["2.running_var"]
    with pytest.raises(ValueError, match=r"got 2.running_var in only one of .*\[0\] and .*\[1\]"):
        syncbn.merge_statistics([state, other], [1, 1])
    other["2.running_var"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"got 2.running_var of shape \(5,\) .* and \(2,\) in"):
        syncbn.merge_statistics([state, other], [1, 1])
    with pytest.raises(ValueError, match="without running statistics"):
        syncbn.merge_statistics([nn.Linear(2, 2).state_dict()], [1])
    with pytest.raises(ValueError, match="got 0 state dicts"):
        syncbn.merge_statistics([], [])


def _merge(rank: int, offset: float) -> dict[str, Tensor]:
    torch.manual_seed(rank)
    part = torch.randn(SIZES[rank], 3, dtype=torch.float64) * (rank + 1) + rank + offset
    net: Any = _network()
    net.load_state_dict(_state(part), strict=False)
    # Also weights that add up to less than one; only integers are exact far from zero.
    size = SIZES[rank] if offset else SIZES[rank] / 1000
    syncbn.merge_over_ranks(net, size if rank < 2 else 0)
    return {"part": part, **net.state_dict()}


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_live_models_over_ranks(three_ranks: Ranks, offset: float) -> None:
    """The third rank has no data: its statistics do not count."""
    answers = three_ranks.run(_merge, offset)
    whole = torch.cat([answer["part"] for answer in answers[:2]])
    rtol = 1e-14 if offset == 0 else 1e-11
    for answer in answers:
        torch.testing.assert_close(answer["0.running_mean"], whole.mean(0), rtol=1e-14, atol=1e-14)
        var = whole.var(0, correction=0)
        torch.testing.assert_close(answer["0.running_var"], var, rtol=rtol, atol=0)
        assert answer["2.running_var"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("model", "count", "message"),
    [
        (_network(), -1, "got count -1; expected a finite number of at least 0"),
        (_network(), math.nan, "got count nan"),
        (_network(), 0, "got count 0 on every rank"),
        (nn.Linear(2, 2), 1, "got a model without running statistics"),
    ],
)
def test_live_models_that_cannot_be_merged(model: nn.Module, count: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        syncbn.merge_over_ranks(model, count)
