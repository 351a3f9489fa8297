"""What tests of the node in C++ share."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.autograd import node
from tests.interpreted_driver import Driver

STEP = ["moments", "normalize", "backward_reduce", "backward_elemt"]
# Kernels of a GPU are not interpreted, and its driver is CUDA's: tests/test_cuda.py.
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of Triton's interpreter")


def layer(channels: int, **options: Any) -> syncbn.SyncBatchNorm:
    """Return a layer, always the same, that Triton's kernels compute."""
    made = syncbn.SyncBatchNorm(channels, **options)
    for i, parameter in enumerate(made.parameters()):
        with torch.no_grad():
            parameter.copy_(torch.linspace(0.5 - i, 1.5, channels))
    made.sync_kernel = "triton"
    return made


def is_node(y: Tensor) -> bool:
    """Return whether the node is to differentiate y."""
    assert y.grad_fn is not None
    return "CppNode<syncbn" in y.grad_fn.name()


def step(made: nn.Module, x: Tensor, dy: Tensor, residual: Tensor | None = None) -> list[Tensor]:
    """Return the output, all gradients, and the averages that have been moved."""
    inputs = [x.detach().requires_grad_(x.requires_grad)]
    if residual is not None:
        inputs.append(residual.detach().requires_grad_(residual.requires_grad))
    y = made(*inputs)
    learned = [t for t in (*inputs, *made.parameters()) if t.requires_grad]
    gradients = torch.autograd.grad(y, learned, dy)
    return [y.detach(), *gradients, *(t.clone() for t in made.buffers())]


def by_python(made: nn.Module, *given: Any, times: int = 1) -> list[Tensor]:
    """Return what the last of some steps finds without the node."""
    with patch.object(node, "_plans", lambda _: None):
        return [step(made, *given) for _ in range(times)][-1]


def by_node(
    driver: Driver, made: nn.Module, *given: Any, launched: list[str] = STEP
) -> list[Tensor]:
    """Return what the third of three steps finds, all of which the node launches."""
    for _ in range(2):
        step(made, *given)
    driver.launched.clear()
    with patch("syncbn.kernels.triton_launch.Launch.__call__", side_effect=AssertionError):
        found = step(made, *given)
    assert driver.launched == launched
    return found


def is_same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Return whether tensors are the same to the bit, and lie alike."""
    return all(
        torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
        for a, b in zip(found, wanted, strict=True)
    )
