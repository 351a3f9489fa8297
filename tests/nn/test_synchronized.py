"""The layer on two and three ranks against one float64 process on the concatenated batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from error_table import QUANTITIES, observe
from oracle import Case, Result, batch, expected, relative_errors
from torch import nn

import syncbn
from tests.device import on_cpu
from tests.kernel_cases import (
    KERNELS,
    KERNELS_AND_DTYPES,
    device_of,
    dtypes_of,
    tolerance,
)
from tests.ranks import Pool, Ranks

# Samples on each of three ranks; two ranks take the last two.
SPLITS = {
    "equal": (4, 4, 4),
    "uneven": (1, 7, 2),
    "empty": (3, 0, 5),
    "one rank has all": (0, 0, 6),
}
#: Channels, spatial size, layout, and True for weight and bias.
SIZES: list[tuple[int, tuple[int, ...], str, bool]] = [
    *(
        (3, (), "contiguous", True),
        (1, (1, 1), "channels_last", True),
        (17, (7,), "strided", False),
    ),
    *((8, (9, 5), "channels_last", True), (5, (2, 3, 4), "contiguous", True)),
]


def observe_all(rank: int, cases: list[Case], kernel: str = "auto") -> list[Result]:
    device = torch.device("cuda") if dist.get_backend() == "nccl" else device_of(kernel)
    # The oracle's generators are on the CPU, whatever the default device is.
    with torch.device("cpu"):
        return [observe(case, rank, device, kernel) for case in cases]


def check(ranks: Ranks, cases: list[Case], kernel: str = "auto") -> None:
    """Compare every quantity on every rank."""
    observed = ranks.run(observe_all, cases, kernel)
    for number, case in enumerate(cases):
        results = [observed[rank][number] for rank in range(ranks.size)]
        for rank, of_rank in enumerate(expected(case)):
            assert results[rank]["y"].dtype == case.dtype
            for name, error in relative_errors(results[rank], of_rank).items():
                half = case.dtype in (torch.float16, torch.bfloat16) and name in ("y", "dx")
                sums = name in ("dweight", "dbias")
                dtype = case.dtype if half else case.parameter_dtype
                bound = tolerance(dtype) * (4 if sums else 1)
                assert error <= bound, f"{name} on rank {rank} of {case}: {error} > {bound}"
        for name in ("running_mean", "running_var"):
            assert all(torch.equal(results[0][name], result[name]) for result in results)


def shapes(ranks: Ranks, split: str, channels: int, *space: int) -> tuple[tuple[int, ...], ...]:
    return tuple((samples, channels, *space) for samples in SPLITS[split][-ranks.size :])


def make_cases(ranks: Ranks, dtype: torch.dtype) -> list[Case]:
    return [
        Case(shapes(ranks, split, channels, *space), dtype, layout, affine=affine)
        for split in SPLITS
        for channels, space, layout, affine in SIZES
    ]


def test_layer_equals_one_process_over_every_transport(ranks: Ranks) -> None:
    check(ranks, make_cases(ranks, torch.float32))


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_AND_DTYPES)
def test_layer_equals_one_process(pool: Pool, kernel: str, dtype: torch.dtype) -> None:
    ranks = pool(3, "gloo")
    check(ranks, make_cases(ranks, dtype), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_layer_keeps_precision(pool: Pool, kernel: str) -> None:
    """Far from zero, and at variances far below eps."""
    ranks = pool(3, "gloo")
    numbers: list[dict[str, Any]] = [{"offset": 100.0}, {"offset": 1e4}, {"scale": 1e-5}]
    cases = [
        Case(shapes(ranks, split, 6, 14, 14), layout=layout, **options)
        for split, layout in (("uneven", "contiguous"), ("empty", "channels_last"))
        for options in numbers
    ]
    check(ranks, cases, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_spatial_size_may_differ_between_ranks(pool: Pool, kernel: str) -> None:
    """Weighted by elements, not by samples; empty in space is empty."""
    sizes, empty = ((2, 3, 5, 4), (3, 3, 11, 2), (1, 3, 1, 1)), ((2, 3, 0, 4), (3, 3, 2, 4))
    cases = [Case(sizes, dtypes_of(kernel)[0]), Case(sizes, layout="channels_last")]
    check(pool(3, "gloo"), [*cases, Case((*empty, (0, 3, 2, 4)))], kernel)


def _autocast(rank: int) -> tuple[torch.dtype, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(2, 4, 1), syncbn.SyncBatchNorm2d(4))
    x = torch.randn(3 * rank, 2, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        loss = y.float().square().sum()
    loss.backward()
    assert model[0].weight.grad is not None
    return y.dtype, model[1].running_var, model[0].weight.grad


def test_empty_rank_under_autocast(pool: Pool) -> None:
    """The empty rank must reduce the same payload as the rest, whatever dtype autocast gives it."""
    answers = pool(3, "gloo").run(_autocast)
    for dtype, running_var, gradient in answers:
        assert dtype == torch.bfloat16
        assert gradient.isfinite().all()
        assert torch.equal(running_var, answers[0][1])
    assert answers[0][2].abs().max() == 0
    assert not torch.equal(answers[0][1], torch.ones(4))


def _half_model(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer = syncbn.SyncBatchNorm2d(2).half()
    y = layer((torch.randn(1, 2, 200, 200) * 3 + rank).half())
    return layer.get_buffer("running_mean"), y


def test_half_model_counts_past_65504(pool: Pool) -> None:
    """80000 values a channel overflow a float16 count."""
    for running_mean, y in pool(2, "gloo").run(_half_model):
        assert running_mean.dtype == torch.float16
        torch.testing.assert_close(running_mean.float(), torch.full((2,), 0.05), atol=0.01, rtol=0)
        assert y.isfinite().all()


def _subgroup(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = dist.new_subgroups_by_enumeration([[0, 1], [2]])[0]
    layer = syncbn.SyncBatchNorm(4, process_group=own, momentum=1.0, dtype=torch.float64)
    x, dy = batch(Case(((2, 4, 3),) * 3, torch.float64), rank)
    x.requires_grad_()
    layer(x).backward(dy)
    assert x.grad is not None
    return layer.get_buffer("running_mean"), x.grad


def test_groups_normalize_separately(three_ranks: Ranks) -> None:
    answers = three_ranks.run(_subgroup)
    for members in ([0, 1], [2]):
        parts = [batch(Case(((2, 4, 3),) * 3, torch.float64), rank) for rank in members]
        x = torch.cat([x for x, _ in parts]).requires_grad_()
        running_mean, running_var = torch.zeros(4).double(), torch.ones(4).double()
        y = nn.functional.batch_norm(x, running_mean, running_var, None, None, True, 1.0)
        y.backward(torch.cat([dy for _, dy in parts]))
        assert x.grad is not None
        for rank, dx in zip(members, x.grad.split(2), strict=True):
            torch.testing.assert_close(answers[rank][0], running_mean)
            torch.testing.assert_close(answers[rank][1], dx)


def _evaluation(rank: int) -> bool:
    layer = syncbn.SyncBatchNorm2d(3).eval()
    if rank == 1:  # With an all-reduce, rank 1 would wait for rank 0.
        assert layer(torch.randn(0, 3, 2, 2)).shape == (0, 3, 2, 2)
        layer(torch.randn(2, 3, 2, 2))
        untracked = syncbn.SyncBatchNorm2d(3, track_running_stats=False).eval()
        x = torch.randn(2, 3, 2, 2)
        torch.testing.assert_close(
            untracked(x), nn.functional.batch_norm(x, None, None, training=True)
        )
    return True


def test_evaluation_does_not_communicate(two_ranks: Ranks) -> None:
    assert two_ranks.run(_evaluation) == [True, True]


def test_error_table_covers_every_quantity() -> None:
    assert set(expected(Case(((2, 3),)))[0]) == set(QUANTITIES)


def _all_empty(rank: int) -> None:
    for momentum in (0.1, None):
        layer = syncbn.SyncBatchNorm2d(3, momentum=momentum)
        layer(torch.randn(4, 3, 2, 2))
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        x = torch.empty(0, 3, 2, 2, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert x.grad is not None
        assert y.shape == x.grad.shape == x.shape
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
        torch.testing.assert_close(layer.weight.grad, torch.zeros(3), rtol=0, atol=0)


@pytest.mark.layers
def test_every_rank_empty_leaves_the_buffers_unchanged(two_ranks: Ranks) -> None:
    two_ranks.run(_all_empty)


def _constant(rank: int) -> list[torch.Tensor]:
    variances = []
    for value in (0.1, 1e3 + 0.1, 1e4 + 0.1, 1e5 + 0.3, 1e6 + 0.3):
        layer = syncbn.SyncBatchNorm2d(2, momentum=1.0)
        layer(torch.full((3 + rank, 2, 7, 5), value))
        variances.append(layer.get_buffer("running_var"))
    return variances


@pytest.mark.layers
def test_a_constant_channel_has_no_variance(ranks: Ranks) -> None:
    for variances in ranks.run(_constant):
        assert not torch.stack(variances).any()


def _one_value(rank: int) -> None:
    layer = syncbn.SyncBatchNorm2d(3)
    with pytest.raises(ValueError, match="single value per channel in the whole group"):
        layer(torch.ones(1 if rank == 1 else 0, 3, 1, 1))
    assert torch.equal(layer.get_buffer("running_var"), torch.ones(3))
    assert layer.num_batches_tracked == 0


@on_cpu
@pytest.mark.layers
def test_one_value_in_the_group_is_an_error_on_every_rank(three_ranks: Ranks) -> None:
    three_ranks.run(_one_value)


def _one_value_each(rank: int) -> bool:
    y = syncbn.SyncBatchNorm2d(3)(torch.full((1, 3, 1, 1), float(rank)))
    return bool(y.isfinite().all())


@pytest.mark.layers
def test_one_value_per_rank_is_enough(two_ranks: Ranks) -> None:
    assert two_ranks.run(_one_value_each) == [True, True]
