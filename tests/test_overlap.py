"""What is done while the backward message is under way: the residual's gradient is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from syncbn.distributed import collectives
from syncbn.distributed.collectives import PendingAllReduce
from syncbn.kernels import choose
from syncbn.kernels.triton.launcher import Launch
from syncbn.ops import backward
from tests.kernel_cases import device_of
from tests.ranks import Ranks

DEVICE = device_of("triton")
SHAPES = [(3, 4, 5, 3), (2, 4, 5, 3), (0, 4, 5, 3)]
BYTES = [4 * torch.Size(shape).numel() for shape in SHAPES]
PATIENCE = 15.0
BESIDE = ["begin", "write", "wait"]
LAUNCHES = {"backward_reduce": "reduce", "through_gate": "write", "backward_elemt": "elemt"}


def _kernels() -> Any:
    return choose("triton", torch.empty(1, 1, device=DEVICE))


def _layer(kernel: str, group: dist.ProcessGroup | None = None) -> syncbn.SyncBatchNorm2d:
    layer = syncbn.SyncBatchNorm2d(4, activation="relu", process_group=group).to(DEVICE)
    layer.impl = kernel
    return layer


def _gradients(kernel: str, rank: int, wanted: str) -> list[Tensor | None]:
    torch.manual_seed(rank)
    layer = _layer(kernel)
    x, residual, dy = torch.randn(3, *SHAPES[rank], device=DEVICE)
    before = dy.clone()
    x.requires_grad_("x" in wanted)
    residual.requires_grad_("r" in wanted)
    layer(x, residual).backward(dy)
    assert torch.equal(dy, before)
    return [t.grad for t in (x, residual, layer.weight, layer.bias)]


@contextmanager
def _noted(
    before: Callable[[str], None] = lambda _: None, after: Callable[[str], None] = lambda _: None
) -> Iterator[list[str]]:
    """Return what is done of a backward pass, in its order; and have more done around launches."""
    done: list[str] = []
    launch, begin, wait = Launch.__call__, collectives.all_reduce_async, PendingAllReduce.wait

    def launching(self: Launch, *given: Any) -> None:
        name = self.steps[0].kernel.__name__
        before(name)
        if name in LAUNCHES:
            done.append(LAUNCHES[name])
        launch(self, *given)
        after(name)

    def beginning(*given: Any) -> PendingAllReduce:
        done.append("begin")
        return begin(*given)

    def waiting(self: PendingAllReduce) -> Tensor:
        done.append("wait")
        return wait(self)

    with (
        patch.object(Launch, "__call__", launching),
        patch.object(collectives, "all_reduce_async", beginning),
        patch.object(PendingAllReduce, "wait", waiting),
    ):
        yield done


def _beside(rank: int, folder: Path) -> tuple[list[str], list[Tensor | None]]:
    """Rank 1 sends its message when rank 0, which has sent its own, has written the gradient."""
    written = folder / "written"

    def writing(name: str) -> None:
        if rank == 0 and name == "through_gate":
            written.touch()

    def late(name: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while name == "backward_reduce" and rank == 1 and not written.exists():
            assert time.monotonic() < deadline, "rank 0 waits for the message, and writes nothing"
            time.sleep(0.01)

    with _noted(late, writing) as done:
        return done, _gradients("triton", rank, "x and r")


def _reference(rank: int, wanted: str) -> list[Tensor | None]:
    return _gradients("reference", rank, wanted)


def test_the_residuals_gradient_is_written_beside_the_message(
    two_on_host: Ranks, tmp_path: Path
) -> None:
    found = two_on_host.run(_beside, tmp_path)
    assert [done for done, _ in found] == [["reduce", *BESIDE, "elemt"]] * 2
    gradients = [gradients for _, gradients in found]
    wanted = two_on_host.run(_reference, "x and r")
    torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-5)


def _written(rank: int, wanted: str, most: int) -> tuple[list[str], list[Tensor | None]]:
    with patch.object(backward, "BESIDE", most), _noted() as done:
        found = _gradients("triton", rank, wanted)
    return [step for step in done if step in BESIDE], found


@pytest.mark.parametrize("most", [-1, BYTES[0] - 1, BYTES[0]], ids=["none", "small", "all"])
@pytest.mark.parametrize("wanted", ["x and r", "x", "r", ""])
def test_gradients_of_a_group(three_ranks: Ranks, wanted: str, most: int) -> None:
    """Some write beside the message, others before it and wait; one rank has no values."""
    found = three_ranks.run(_written, wanted, most)
    are_beside = [bool(wanted) and n <= most for n in BYTES]
    assert [done for done, _ in found] == [BESIDE if is_beside else [] for is_beside in are_beside]
    gradients = [gradients for _, gradients in found]
    wanted_ones = three_ranks.run(_reference, wanted)
    torch.testing.assert_close(gradients, wanted_ones, rtol=1e-5, atol=1e-5)


def _copies(rank: int) -> int:
    triton, copies = _kernels(), []
    alike = triton.alike

    def counted(dy: Tensor, *given: Any) -> Any:
        found, stride = alike(dy, *given)
        if found.data_ptr() != dy.data_ptr():
            copies.append(found)
        return found, stride

    x, residual = torch.randn(2, *SHAPES[0], device=DEVICE).requires_grad_()
    with patch.object(triton, "alike", counted):
        _layer("triton")(x, residual).sum().backward()
    return len(copies)


def test_a_gradient_is_laid_out_once(two_ranks: Ranks) -> None:
    """That of a sum is a single number, expanded, which no kernel reads."""
    assert two_ranks.run(_copies) == [1, 1]


def _absent(rank: int) -> str:
    """Rank 1 leaves its backward pass out, when all is compiled that compiles."""
    _gradients("triton", rank, "x and r")
    hasty = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    x, residual = torch.randn(2, *SHAPES[0], device=DEVICE).requires_grad_()
    y = _layer("triton", hasty)(x, residual)
    if rank == 1:
        return ""
    with pytest.raises(RuntimeError) as caught:
        y.backward(torch.ones_like(y))
    return str(caught.value)


def test_a_message_that_fails_names_the_layer(two_on_host: Ranks) -> None:
    message = two_on_host.run(_absent)[0]
    assert message.startswith("SyncBatchNorm2d(4) backward of call ")
    numbers = 10 if DEVICE.type == "cpu" else 8  # with a fingerprint on the CPU alone
    assert f"input: the all-reduce of {numbers} elements failed on rank 0 of 2" in message
    two_on_host.close()  # The group is broken.
