"""How many kernels a GPU is told to run, in a pass of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from syncbn.bench.report import Table

_STEADY = 2


@dataclass(frozen=True)
class Launches:
    """Of one layer.

    Attributes:
        name: of the layer.
        forward: names of what ran on the GPU.
        backward: the same.
    """

    name: str
    forward: list[str]
    backward: list[str]


def count(name: str, call: Callable[[], Tensor], dy: Tensor, inputs: list[Tensor]) -> Launches:
    """Return what a layer launches once it has been compiled.

    Args:
        name: of the layer.
        call: runs it, and returns its output.
        dy: gradient of the output.
        inputs: whose gradients are wanted.
    """
    for _ in range(_STEADY):
        torch.autograd.grad(call(), inputs, dy)
    outputs: list[Tensor] = []
    forward = _launched(lambda: outputs.append(call()))
    backward = _launched(lambda: torch.autograd.grad(outputs[0], inputs, dy))
    return Launches(name, forward, backward)


def table(found: list[Launches], shape: str) -> Table:
    """Return how many there are."""
    rows = [[one.name, str(len(one.forward)), str(len(one.backward))] for one in found]
    return Table(
        f"Kernels launched by a layer in a group of one, input {shape}",
        ["", "forward", "backward"],
        rows,
    )


def _launched(call: Callable[[], object]) -> list[str]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return [event.name for event in seen.events() if event.device_type == DeviceType.CUDA]
