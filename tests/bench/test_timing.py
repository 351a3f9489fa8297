"""Percentiles and interleaved timing."""

from __future__ import annotations

import time
from functools import partial

import torch

from syncbn.bench.timing import Percentiles, interleave


def test_percentiles() -> None:
    percentiles = Percentiles.of(torch.arange(101, dtype=torch.float64).flip(0))
    assert (percentiles.low, percentiles.median, percentiles.high) == (10, 50, 90)
    assert percentiles.text() == "50 (10..90)"
    assert percentiles.text(unit=25) == "2.0 (0.4..3.6)"


def test_interleave_shuffles_each_round() -> None:
    """Regression: with many calls, the first few always followed the same calls."""
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "abcd"}
    times = interleave(calls, rounds=30, burst=2, barrier=partial(order.append, "|"))
    turns = "".join(order).split("|")[1:]
    rounds = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert len(rounds) == 2 + 30  # two rounds warm up
    assert all(sorted(turns) == ["aa", "bb", "cc", "dd"] for turns in rounds)
    assert all(len(set(column)) == 4 for column in zip(*rounds, strict=True))
    assert all(len(seconds) == 30 * 2 for seconds in times.values())


def test_interleave_returns_seconds() -> None:
    times = interleave({"sleep": partial(time.sleep, 0.02)}, rounds=2)
    assert times["sleep"].min() >= 0.02
