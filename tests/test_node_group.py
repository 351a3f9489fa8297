"""The node in C++ over ranks: messages are Python's, and the rest is launched by the node."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from syncbn.autograd import backward, node
from tests.interpreted_driver import kept
from tests.node import by_node, by_python, is_node, is_same, layer, no_gpu, step
from tests.ranks import Ranks

pytestmark = no_gpu
# Without a gate, beside it, or before the message.
WAYS = {
    "plain": ["moments", "normalize", "backward_reduce", "backward_elemt"],
    "gated": ["moments", "normalize", "backward_reduce", "through_gate", "backward_elemt"],
    "large": ["moments", "normalize", "backward_reduce", "backward_elemt"],
}


def _steps(rank: int, way: str, last: bool, needs_residual: bool) -> tuple[list[str], bool, bool]:
    torch.manual_seed(rank)
    memory_format = torch.channels_last if last else torch.contiguous_format
    x, r, dy = (
        torch.randn(3 + rank, 6, 5, 3).contiguous(memory_format=memory_format) for _ in range(3)
    )
    x.requires_grad_()
    r.requires_grad_(needs_residual)
    given = x, dy, *([] if way == "plain" else [r])
    made, twin = layer(6, activation="relu"), layer(6, activation="relu")
    most = -1 if way == "large" else backward.BESIDE
    with (
        patch.object(backward, "BESIDE", most),
        patch.object(node, "BESIDE", most),
        kept() as driver,
    ):
        found = by_node(driver, made, *given, launched=WAYS[way])
        wanted = by_python(twin, *given, times=3)
        launched = driver.launched[: len(WAYS[way])]
        return launched, is_same(found, wanted), is_node(made(*given[::2]))


@pytest.mark.parametrize("needs_residual", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_to_the_bit(
    two_on_host: Ranks, way: str, last: bool, needs_residual: bool
) -> None:
    found = two_on_host.run(_steps, way, last, needs_residual)
    assert found == [(WAYS[way], True, True)] * 2


def _overwrites(rank: int) -> list[bool]:
    """Return whether dx is where dy was: alone, behind a gate, and where a residual needs that."""
    found = []
    x, r = (torch.randn(3, 6, 5, 3, requires_grad=True) for _ in range(2))
    with patch.object(node, "SMALL_ON_GPU", 0), kept() as driver:
        for residual in (None, r.detach(), r):
            made = layer(6, activation=None if residual is None else "relu")
            for _ in range(3):
                y = made(x, residual)
                y.square().sum().backward()
            elemt = [told for told in driver.told if "dx_ptr" in told][-1]
            found.append(elemt["dx_ptr"] == elemt["dy_ptr"])
    return found


def test_dx_takes_memory_that_nobody_needs(two_on_host: Ranks) -> None:
    assert two_on_host.run(_overwrites) == [[True, True, False]] * 2


def _uneven(rank: int) -> list[list[float]]:
    """Rank 1 has no values, which the node does not serve."""
    x = torch.arange(24.0).view(4, 6)[: 4 * (1 - rank)].clone().requires_grad_()
    made = layer(6)
    y = made(x)
    assert is_node(y) == (rank == 0)
    y.backward(torch.ones_like(y))
    assert made.weight.grad is not None
    return [made.get_buffer("running_mean").tolist(), made.weight.grad.tolist()]


def test_ranks_may_differ_in_whether_it_serves_them(two_on_host: Ranks) -> None:
    first, second = two_on_host.run(_uneven)
    assert first[0] == second[0]
    assert second[1] == [0.0] * 6


def _alone_and_together(rank: int) -> bool:
    """A layer of a group and one of a rank alone, of inputs that lie alike."""
    alone = [dist.new_group([i]) for i in range(2)][rank]
    torch.manual_seed(rank)
    x, dy = torch.randn(3, 6, 5, 3, requires_grad=True), torch.randn(3, 6, 5, 3)
    with kept():
        found = [step(layer(6, process_group=g), x, dy) for _ in range(3) for g in (alone, None)]
    with patch.object(node, "_plans", lambda _: None):
        wanted = [step(layer(6, process_group=g), x, dy) for _ in range(3) for g in (alone, None)]
    return all(map(is_same, found, wanted)) and not is_same(found[0], found[1])


def test_a_rank_may_be_alone_for_some_layers(two_on_host: Ranks) -> None:
    assert two_on_host.run(_alone_and_together) == [True, True]
