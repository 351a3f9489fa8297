"""Virtual batches: the same training on one rank and on two."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.ops.virtual_batch import divide_batch
from tests.device import seeded
from tests.ranks import Pool, Ranks

pytestmark = pytest.mark.layers

GLOBAL_BATCH, STEPS = 16, 20


def make_network(size: int) -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None)]
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 1), norms[1]),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    ).double()
    return syncbn.convert_sync_batchnorm(net, normalization_batch=size)


def train(rank: int, ranks: int, size: int, fused: bool) -> dict[str, Tensor]:
    """Return parameters and buffers after some steps on a share of the same batches."""
    net = make_network(size)
    if fused:
        assert syncbn.fuse(net).fused == {"1": "relu"}
    model: nn.Module = net if ranks == 1 else DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    generator = seeded(1)
    for _ in range(STEPS):
        x = torch.randn(GLOBAL_BATCH, 2, 6, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 3, (GLOBAL_BATCH,), generator=generator)
        own = slice(rank * GLOBAL_BATCH // ranks, (rank + 1) * GLOBAL_BATCH // ranks)
        optimizer.zero_grad()
        F.cross_entropy(model(x[own]), labels[own]).backward()
        optimizer.step()
    return copy.deepcopy(net.state_dict())


@pytest.mark.parametrize(("size", "fused"), [(8, False), (8, True), (16, False), (4, False)])
def test_training_does_not_depend_on_the_number_of_ranks(
    pool: Pool, size: int, fused: bool
) -> None:
    """Each of two ranks holds one virtual batch, half of one, or two."""
    expected = train(0, 1, size, False)
    for state in pool(2, "gloo").run(train, 2, size, fused):
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


def test_one_rank_equals_batch_norm_of_each_part() -> None:
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    residual = torch.randn_like(x, requires_grad=True)
    layer = syncbn.SyncBatchNorm1d(3, dtype=torch.float64, activation="silu")
    plain = nn.BatchNorm1d(3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.uniform_()
    plain.load_state_dict(layer.state_dict())
    layer.normalization_batch = 2
    y = layer(x, residual)
    parts = zip(x.split(2), residual.split(2), strict=True)
    expected = torch.cat([F.silu(plain(part) + added) for part, added in parts])
    torch.testing.assert_close(y, expected)
    inputs = [x, residual]
    actual = torch.autograd.grad(y.square().sum(), [*inputs, *layer.parameters()])
    wanted = torch.autograd.grad(expected.square().sum(), [*inputs, *plain.parameters()])
    torch.testing.assert_close(actual, wanted)
    means = torch.stack([part.mean((0, 2)) for part in x.split(2)])
    variances = torch.stack([part.var((0, 2)) for part in x.split(2)])
    torch.testing.assert_close(layer.running_mean, 0.1 * means.mean(0))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * variances.mean(0))
    assert layer.num_batches_tracked == 1
    layer.eval()
    torch.testing.assert_close(
        layer(x[:5]),
        F.silu(
            F.batch_norm(x[:5], layer.running_mean, layer.running_var, layer.weight, layer.bias)
        ),
    )


def test_recomputation_counts_once() -> None:
    layer = syncbn.SyncBatchNorm1d(3)
    layer.normalization_batch = 2
    x = torch.randn(6, 3, requires_grad=True)
    expected = layer(x)
    count, state = 1, copy.deepcopy(layer.state_dict())
    y: Any = checkpoint(layer, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert layer.num_batches_tracked == count + 1
    assert state["num_batches_tracked"] == count


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled() -> None:
    layer = syncbn.SyncBatchNorm1d(3)
    layer.normalization_batch = 2
    x = torch.randn(6, 3)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("samples", "size", "nearest"),
    [(5, 8, [8, 16]), (12, 8, [8, 16]), (0, 4, [4, 8]), (3, 2, [2, 4])],
)
def test_samples_that_do_not_divide(samples: int, size: int, nearest: list[int]) -> None:
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3), normalization_batch=size)
    numbers = re.escape(str(nearest))
    message = f"got {samples} samples per rank on 1 ranks.*={size}; .*such as {numbers}"
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(samples, 3))
    assert layer.num_batches_tracked == 0


def _unequal_batches(rank: int) -> str:
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3), normalization_batch=4)
    try:
        layer(torch.randn(4 if rank else 8, 3))
    except RuntimeError as error:
        return str(error)
    return ""


def test_unequal_batches_are_an_error_on_every_rank(two_ranks: Ranks) -> None:
    for rank, message in enumerate(two_ranks.run(_unequal_batches)):
        assert f"{4 if rank else 8} samples per rank: this was all-reduce" in message


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8"])
def test_bad_sizes(size: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(
        ValueError, match=r"got normalization_batch .*; expected a positive integer"
    ):
        syncbn.convert_sync_batchnorm(model, normalization_batch=size)
    assert type(model[0]) is nn.BatchNorm1d
    layer = syncbn.SyncBatchNorm1d(3)
    with pytest.raises(ValueError, match="got normalization_batch"):
        layer.normalization_batch = size


def test_unsupported_uses() -> None:
    layer = syncbn.SyncBatchNorm1d(3)
    layer.normalization_batch = 2
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="got a mask; expected none for a layer with normal"):
        layer(x, mask=torch.ones(4, dtype=torch.bool))
    with syncbn.accumulate_statistics(layer), pytest.raises(ValueError, match="got accumulate_st"):
        layer(x)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert dx.shape == x.shape
    with pytest.raises(RuntimeError, match="have only first derivatives"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert "normalization_batch=2" in repr(layer)


def test_groups_of_listed_ranks(pool: Pool) -> None:
    for rank, (mean, error) in enumerate(pool(3, "gloo").run(_listed)):
        assert mean == (2 if rank == 2 else 0.5)
        assert "got groups [[0, 1], [1, 2]]; expected lists that contain each of the ranks" in error


def _listed(rank: int) -> tuple[float, str]:
    layer: Any = nn.BatchNorm1d(1, momentum=1.0)
    syncbn.convert_sync_batchnorm(layer, [[0, 1], [2]])
    layer(torch.full((2, 1), float(rank)))
    try:
        syncbn.convert_sync_batchnorm(layer, [[0, 1], [1, 2]])
    except ValueError as error:
        return layer.running_mean.item(), str(error)
    return 0.0, ""


def test_division_of_batches() -> None:
    assert divide_batch(8, 4, None) == ([4, 4], False, 0, 1, 1)
    assert divide_batch(4, 4, None) == ([4], False, 0, 1, 1)


def _indivisible_on_one_rank(rank: int) -> str:
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3), normalization_batch=8)
    try:
        layer(torch.randn(4 if rank else 3, 3))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def test_indivisible_batch_of_one_rank_is_an_error_on_every_rank(two_ranks: Ranks) -> None:
    messages = two_ranks.run(_indivisible_on_one_rank)
    assert "got 3 samples per rank on 2 ranks" in messages[0]
    assert "at least one other rank was in another layer" in messages[1]


def test_single_values_have_no_variance() -> None:
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3), normalization_batch=1)
    with pytest.raises(ValueError, match="got a single value per channel"):
        layer(torch.randn(4, 3))
