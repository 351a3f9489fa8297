"""Layers in a different order on some ranks raise on every rank; no false positives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import syncbn
from syncbn.distributed import collectives
from syncbn.distributed.groups import active_group
from tests.ranks import Pool, Ranks


@pytest.fixture(params=[(2, "openmpi"), (3, "gloo")], ids=["two of openmpi", "three of gloo"])
def cpu_ranks(request: pytest.FixtureRequest, pool: Pool) -> Ranks:
    return pool(*request.param)


def _sum_of(rank: int, name: str) -> Tensor:
    ones = torch.ones(2, 4, dtype=torch.float64)
    vectors = {
        "negative view": torch._neg_view(ones[0]),
        "zero tensor": torch._efficientzerotensor(4, dtype=torch.float64),
        "strided": torch.arange(8.0, dtype=torch.float64)[::2],
        "rows": ones,
    }
    return collectives.all_reduce(vectors[name], active_group(None), "a label").clone()


def test_vectors_without_plain_memory(two_ranks: Ranks) -> None:
    """Regression: values were copied from the address, whatever the address meant."""
    expected = {
        "negative view": [-2.0] * 4,
        "zero tensor": [0.0] * 4,
        "strided": [0.0, 4.0, 8.0, 12.0],
        "rows": [[2.0] * 4] * 2,
    }
    for name, values in expected.items():
        for total in two_ranks.run(_sum_of, name):
            assert total.tolist() == values, name


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).double()
    return syncbn.convert_sync_batchnorm(layers)


def _input(rank: int) -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def _catch_error(model: nn.Module, function: Callable[[], Any]) -> str:
    """Return the error of a function that leaves buffers and gradients unchanged."""

    def state() -> dict[str, Tensor]:
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return copy.deepcopy({**dict(model.named_buffers()), **gradients})

    before = state()
    with pytest.raises(RuntimeError) as caught:
        function()
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    return str(caught.value)


def _other_order(rank: int) -> tuple[str, Tensor]:
    model: Any = _model()
    x = _input(rank)
    first, second = reversed(model) if rank == dist.get_world_size() - 1 else model
    message = _catch_error(model, lambda: second(first(x)))
    # One more step works, since the error was on all ranks.
    model[0].reset_running_stats()
    model(x).square().sum().backward()
    return message, model[0].get_buffer("running_mean")


def test_layers_of_equal_size_in_other_order_raise(cpu_ranks: Ranks) -> None:
    """Their sums were exchanged silently."""
    answers = cpu_ranks.run(_other_order)
    expected = torch.cat([_input(rank) for rank in range(cpu_ranks.size)]).mean(0) * 0.1
    for rank, (message, mean) in enumerate(answers):
        layer = 1 if rank == cpu_ranks.size - 1 else 0
        assert message.startswith(f"{layer} SyncBatchNorm1d(3) forward, torch.float64 input: this")
        assert f"on rank {rank} of {cpu_ranks.size}, but at least one other rank was in" in message
        assert "another layer, direction, call" in message
        assert "TORCH_DISTRIBUTED_DEBUG=DETAIL" in message
        torch.testing.assert_close(mean, expected)


def _skip_backward(rank: int) -> str:
    # Not float64, whose payloads have different sizes in the two passes.
    model, x = _model().float(), _input(rank).float()
    loss = model(x).square().sum()
    return _catch_error(model, loss.backward if rank != 1 else lambda: model(x))


def test_rank_that_skips_backward_raises(cpu_ranks: Ranks) -> None:
    """Its next forward all-reduce is summed with the backward all-reduce of the other ranks."""
    for rank, message in enumerate(cpu_ranks.run(_skip_backward)):
        here = "0 SyncBatchNorm1d(3) forward" if rank == 1 else "1 SyncBatchNorm1d(3) backward"
        assert message.startswith(here), message
        assert "this was all-reduce" in message


def _backward_in_other_order(rank: int, losses: Sequence[Tensor]) -> None:
    for loss in reversed(losses) if rank == 1 else losses:
        loss.backward()


def _calls_in_other_order(rank: int) -> list[str]:
    model = _model()
    with torch.no_grad():  # calls of other layers do not matter
        model(_input(rank))
    leaves = [_input(rank).requires_grad_() for _ in range(2)]
    losses = [model[0](leaf).pow(3).sum() for leaf in leaves]
    messages = [_catch_error(model, partial(_backward_in_other_order, rank, losses))]
    products = []
    for leaf in leaves:  # the backward graph contains third-order formulas
        (dx,) = torch.autograd.grad(model[0](leaf).pow(3).sum(), leaf, create_graph=True)
        products.append(dx.pow(2).sum())
    return [*messages, _catch_error(model, partial(_backward_in_other_order, rank, products))]


def test_calls_with_backward_in_other_order_raise(cpu_ranks: Ranks) -> None:
    """The two calls in a siamese network differ only in the call number."""
    for messages in cpu_ranks.run(_calls_in_other_order):
        for message, direction in zip(messages, ("backward", "double backward"), strict=True):
            assert message.startswith(f"0 SyncBatchNorm1d(3) {direction} of call "), message


def _composite_in_other_order(rank: int) -> str:
    layers = [syncbn.SyncBatchNorm1d(3, track_running_stats=False) for _ in range(2)]
    for number, layer in enumerate(layers):
        layer.fqn = str(number)
    x = torch.randn(4, 3)
    first = layers[int(rank == 1)]
    return _catch_error(first, lambda: torch.func.jvp(first, (x,), (torch.ones_like(x),)))


def test_composite_layers_in_other_order_raise(cpu_ranks: Ranks) -> None:
    for rank, message in enumerate(cpu_ranks.run(_composite_in_other_order)):
        assert message.startswith(f"{int(rank == 1)} SyncBatchNorm1d(3) forward"), message


def _matching_steps(rank: int) -> None:
    model, mine = _model(), _input(rank)
    # Uneven batches, one with a single sample.
    model(torch.randn(rank, 3, dtype=torch.float64) if rank else mine).square().sum().backward()
    # A copy, then a checkpoint, on one rank.
    copied = copy.deepcopy(model) if rank == 0 else model
    copied(mine).square().sum().backward()
    # An input with a gradient on one rank.
    model(mine.clone().requires_grad_(rank == 0)).square().sum().backward()
    if rank == 0:
        model.load_state_dict(_model().state_dict())
    # Other groups, with other numbers of calls.
    syncbn.convert_sync_batchnorm(model, dist.new_group())
    model(mine).square().sum().backward()
    syncbn.convert_sync_batchnorm(model, 1)
    for _ in range(rank):
        model(mine).square().sum().backward()
    syncbn.convert_sync_batchnorm(model, "world")
    model(mine).square().sum().backward()
    with syncbn.accumulate_statistics(model):
        for _ in range(2):
            model(mine).square().sum().backward()
    # A forward pass without gradients on some ranks.
    with torch.set_grad_enabled(rank == 0):
        model(mine)
    # A retained graph.
    loss = model(mine).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    # Gradients of gradients.
    leaf = mine.requires_grad_()
    (dx,) = torch.autograd.grad(model(leaf).pow(3).sum(), leaf, create_graph=True)
    dx.square().sum().backward()
    # Recomputed activations.
    block = nn.Sequential(*model, nn.Linear(3, 3).double())
    y = checkpoint(block, leaf, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)
    y.square().sum().backward()


def test_matching_ranks_pass(cpu_ranks: Ranks) -> None:
    cpu_ranks.run(_matching_steps)


def _compiled_on_one_rank(rank: int) -> tuple[Tensor, Tensor, str]:
    model = _model()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = _input(rank).requires_grad_()
    for block in (compiled, compiled if rank == 0 else model):
        block(x).pow(3).sum().backward()
    # Calls of eager layers are still checked, with equal numbers on all ranks.
    losses = [model[0](_input(rank).requires_grad_()).sum() for _ in range(2)]
    message = _catch_error(model, partial(_backward_in_other_order, rank, losses))
    assert x.grad is not None
    return x.grad, model[1].get_buffer("running_mean"), message


def test_compiled_ranks_are_not_checked(pool: Pool) -> None:
    """One rank may fall back to eager execution, whose payloads have the same size."""
    answers = pool(2, "openmpi").run(_compiled_on_one_rank)
    x = torch.cat([_input(rank) for rank in range(2)]).requires_grad_()
    layers = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).double()
    for _ in range(2):
        layers(x).pow(3).sum().backward()
    assert x.grad is not None
    for part, (gradient, mean, message) in zip(x.grad.split(4), answers, strict=True):
        torch.testing.assert_close(gradient, part)
        torch.testing.assert_close(mean, layers[1].running_mean)
        assert message.startswith("0 SyncBatchNorm1d(3) backward of call "), message


@pytest.fixture
def fake_group() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_fake_backend_passes(fake_group: None) -> None:
    """Dry runs on torch's "fake" backend measure the memory of one rank; nothing is summed."""
    layer = syncbn.SyncBatchNorm1d(3)
    layer(torch.randn(4, 3, requires_grad=True)).sum().backward()


def test_fake_tensors_are_not_checked(fake_group: None) -> None:
    """The check read the sum of a fake tensor, which is an error."""
    with FakeTensorMode():
        layer = syncbn.SyncBatchNorm1d(3)
        layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    layer, x = syncbn.SyncBatchNorm1d(3, track_running_stats=False), torch.randn(4, 3)
    torch.testing.assert_close(make_fx(layer)(x)(x), layer(x))


def _one_rank_under_mode(rank: int) -> int:
    layer = syncbn.SyncBatchNorm1d(3)
    for _ in range(2):
        with FlopCounterMode(display=False) if rank == 0 else nullcontext():
            layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    layer(torch.randn(4, 3)).sum().backward()
    return int(layer.get_buffer("num_batches_tracked"))


def test_dispatch_mode_on_one_rank_is_no_error(cpu_ranks: Ranks) -> None:
    assert set(cpu_ranks.run(_one_rank_under_mode)) == {3}
