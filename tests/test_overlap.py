"""What is done while the backward message is under way: the residual's gradient is written."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from syncbn.autograd import backward
from syncbn.kernels import choose
from tests.kernels import device_of
from tests.ranks import Ranks

DEVICE = device_of("triton")
SHAPES = [(3, 4, 5, 3), (0, 4, 5, 3), (2, 4, 5, 3)]
PATIENCE = 15.0


def _kernels() -> Any:
    return choose("triton", torch.empty(1, 1, device=DEVICE))


def _layer(kernel: str, group: dist.ProcessGroup | None = None) -> syncbn.SyncBatchNorm2d:
    layer = syncbn.SyncBatchNorm2d(4, activation="relu", process_group=group).to(DEVICE)
    layer.sync_kernel = kernel
    return layer


def _gradients(kernel: str, rank: int, wanted: str) -> list[Tensor | None]:
    torch.manual_seed(rank)
    layer = _layer(kernel)
    x, residual, dy = torch.randn(3, *SHAPES[rank], device=DEVICE)
    x.requires_grad_("x" in wanted)
    residual.requires_grad_("r" in wanted)
    layer(x, residual).backward(dy)
    return [t.grad for t in (x, residual, layer.weight, layer.bias)]


def _beside(rank: int, folder: Path) -> list[Tensor | None]:
    """Rank 1 sends its message when rank 0, which has sent its own, has written the gradient."""
    triton, written = _kernels(), folder / "written"
    write, reduce = triton.through_gate, triton.backward_reduce_gated

    def writing(*given: Any) -> Tensor:
        found: Tensor = write(*given)
        if rank == 0:
            written.touch()
        return found

    def late(*given: Any, **options: Any) -> Any:
        deadline = time.monotonic() + PATIENCE
        while rank == 1 and not written.exists():
            assert time.monotonic() < deadline, "rank 0 waits for the message, and writes nothing"
            time.sleep(0.01)
        return reduce(*given, **options)

    with (
        patch.object(triton, "through_gate", writing),
        patch.object(triton, "backward_reduce_gated", late),
    ):
        return _gradients("triton", rank, "x and r")


def _reference(rank: int, wanted: str) -> list[Tensor | None]:
    return _gradients("reference", rank, wanted)


def test_the_residuals_gradient_is_written_beside_the_message(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    found = two_ranks.run(_beside, tmp_path)
    torch.testing.assert_close(found, two_ranks.run(_reference, "x and r"), rtol=1e-5, atol=1e-5)


def _written(rank: int, wanted: str, most: int) -> list[Tensor | None]:
    with patch.object(backward, "_BESIDE", most):
        return _gradients("triton", rank, wanted)


@pytest.mark.parametrize("most", [0, backward._BESIDE], ids=["in a pass with others", "beside"])
@pytest.mark.parametrize("wanted", ["x and r", "x", "r", ""])
def test_gradients_of_a_group(three_ranks: Ranks, wanted: str, most: int) -> None:
    """Also on a rank without values, and where x or the residual needs none."""
    found = three_ranks.run(_written, wanted, most)
    torch.testing.assert_close(found, three_ranks.run(_reference, wanted), rtol=1e-5, atol=1e-5)


def _absent(rank: int) -> str:
    """Rank 1 leaves its backward pass out."""
    hasty = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    x, residual = torch.randn(2, *SHAPES[0], device=DEVICE).requires_grad_()
    y = _layer("triton", hasty)(x, residual)
    if rank == 1:
        return ""
    with pytest.raises(RuntimeError) as caught:
        y.sum().backward()
    return str(caught.value)


def test_a_message_that_fails_names_the_layer(two_ranks: Ranks) -> None:
    message = two_ranks.run(_absent)[0]
    assert message.startswith("SyncBatchNorm2d(4) backward, torch.float32 input: the all-reduce")
    assert "8 numbers failed on rank 0 of 2" in message
    two_ranks.close()  # The group is broken.
