"""Activation checkpointing: a recomputation neither communicates nor counts a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import syncbn
from syncbn.distributed import collectives
from tests.ranks import Ranks

pytestmark = pytest.mark.layers

Block = Callable[[Tensor], Tensor]
ours = partial(checkpoint, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)


class Net(nn.Module):
    """Two blocks of two synchronized layers each, and how they are called."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = partial(syncbn.SyncBatchNorm2d, momentum=momentum)
        self.first = nn.Sequential(nn.Conv2d(2, 3, 3), norm(3), nn.ReLU(), norm(3))
        self.second = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4, activation="relu"), norm(4))
        self.double()

    def forward(self, x: Tensor, around: Callable[[Block, Tensor], Any]) -> Any:
        return around(self.second, around(self.first, x))


def _plainly(block: Block, x: Tensor) -> Tensor:
    return block(x)


def _nested(block: Block, x: Tensor) -> Any:
    return ours(lambda x: ours(block, x) + 0, x)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # Layers sum, too: sums of one recomputation must not replace another's.
    save = (torch.ops.aten.convolution.default, torch.ops.aten.sum.dim_IntList)
    return CheckpointPolicy.MUST_SAVE if op in save else CheckpointPolicy.PREFER_RECOMPUTE


def _selective(block: Block, x: Tensor) -> Any:
    inner = partial(create_selective_checkpoint_contexts, _policy)
    context_fn = partial(syncbn.checkpoint_contexts, inner)
    return checkpoint(partial(_unselected, block), x, use_reentrant=False, context_fn=context_fn)


def _unselected(block: Block, x: Tensor) -> Tensor:
    return block(x) * x.sum((1, 2, 3), keepdim=True).cos()


WAYS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "ours": (ours, _plainly),
    "nested": (_nested, _plainly),
    "selective": (_selective, _unselected),
}


def _train(
    rank: int, around: Callable[..., Tensor], momentum: float | None = 0.1, passes: int = 1
) -> tuple[dict[str, Tensor], int]:
    """Return gradients and buffers after two steps, and the all-reduces of a step."""
    net = Net(momentum)
    start = collectives.start_all_reduce
    with patch.object(collectives, "start_all_reduce", wraps=start) as all_reduce:
        for step in range(2):
            torch.manual_seed(10 * step + rank)
            x = torch.randn(rank + 2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
            loss = net(x, around).square().sum()
            for left in reversed(range(passes)):
                loss.backward(retain_graph=left > 0)
    assert x.grad is not None
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"x": x.grad, **gradients, **dict(net.named_buffers())}, all_reduce.call_count // 2


def _compare(rank: int, way: str) -> list[int]:
    """Compare with training without checkpoints; return numbers of all-reduces."""
    checkpointed, plain = WAYS[way]
    counts = []
    # A retained graph is recomputed twice, unless torch forbids it.
    retained = [] if way == "selective" else [(0.1, 2)]
    for momentum, passes in [(0.1, 1), (None, 1), *retained]:
        actual, count = _train(rank, checkpointed, momentum, passes)
        expected, _ = _train(rank, plain, momentum, passes)
        assert actual["first.1.num_batches_tracked"] == 2
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        counts.append(count)
    return counts


@pytest.mark.parametrize("way", WAYS)
def test_training_is_unchanged(two_ranks: Ranks, way: str) -> None:
    for counts in two_ranks.run(_compare, way):
        assert counts == [8, 8, 12][: 2 if way == "selective" else 3]


def test_a_single_rank() -> None:
    assert _compare(0, "ours") == [0, 0, 0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_without_contexts_statistics_move_twice(reentrant: bool) -> None:
    """As documented: torch does not report a recomputation."""
    net = Net()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    net(x, partial(checkpoint, use_reentrant=reentrant)).sum().backward()
    assert net.get_buffer("first.1.num_batches_tracked") == 2


@pytest.mark.parametrize(("channels", "dtype"), [(3, torch.float32), (2, torch.float64)])
def test_another_recomputation_is_an_error(channels: int, dtype: torch.dtype) -> None:
    """Packed moments of 2 float64 channels have the length of 4 float32 channels."""
    first, second = syncbn.SyncBatchNorm(channels, dtype=dtype), syncbn.SyncBatchNorm(4)
    x = torch.randn(5, channels + 4, requires_grad=True)
    calls = 0

    def region(x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        a, b = x.split([channels, 4], 1)
        layers: list[Any] = [lambda: first(a.to(dtype)).sum(), lambda: second(b).sum()]
        return sum(layer() for layer in (layers if calls == 1 else layers[::-1]))

    y = ours(region, x)
    there = f"had one of {channels} channels and {dtype} inputs"
    with pytest.raises(RuntimeError, match=f"of 4 channels and .* the forward pass {there}"):
        y.backward()
    assert first(torch.randn(5, channels, dtype=dtype)).shape == (5, channels)
    assert syncbn.ops.activation_checkpoint.current() is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own call
def test_statistics_move_once_under_forward_mode_differentiation() -> None:
    """Regression: the composite formulas updated them again in the recomputation."""
    net, expected = Net(), Net()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    with fwad.dual_level():
        dual = fwad.make_dual(x, torch.ones_like(x))
        net(dual, ours).square().sum().backward()
    gradient, x.grad = x.grad, None
    expected(x, _plainly).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(gradient, x.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(net.named_buffers()), dict(expected.named_buffers()))
