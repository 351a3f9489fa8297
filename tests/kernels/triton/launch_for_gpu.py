"""Compare the first launch of each plan, by Triton's JIT, with later ones of the cached kernel.

``python -m tests.kernels.triton.launch_for_gpu`` compiles for compute capability 9.0, records
launches (:mod:`tests.kernels.triton.absent_gpu`), and prints the results of comparisons as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from syncbn.kernels.activations import Activation
from syncbn.kernels.base import NormalizeArgs, RunningStats
from syncbn.kernels.layout import NCSLayout
from syncbn.kernels.triton import TritonKernel, launcher
from syncbn.kernels.triton.launcher import LaunchPlan
from tests.kernels.triton.absent_gpu import Launch, compile_for
from tests.kernels.triton.compile_for_gpu import describe

KERNEL = TritonKernel()


def run_layer(x: Tensor, weight: Tensor) -> None:
    """Call every method, with all optional arguments."""
    running = RunningStats(weight.clone(), weight.clone(), torch.tensor(3), 0.1)
    args = NormalizeArgs(1e-5, weight, weight, Activation("relu"), running)
    _, saved = KERNEL.normalize(x, KERNEL.moments(x), args, x)
    reduced = KERNEL.backward_reduce(x, saved, (True,) * 4)
    KERNEL.backward_elemt(saved, reduced, reduced.sums)


def repeats_launches(launches: list[Launch], call: Callable[[], None]) -> bool:
    """Return whether every plan's cached kernel gets the arguments that Triton's JIT passed."""
    launch, is_equal = LaunchPlan.__call__, list[bool]()

    def launch_twice(plan: LaunchPlan, **values: Any) -> None:
        plan._compiled.clear()
        start = len(launches)
        launch(plan, **values)
        launch(plan, **values)
        first, second = launches[start:]
        same = [a is b or a == b for a, b in zip(first.arguments, second.arguments, strict=True)]
        is_equal.append(first[:3] == second[:3] and all(same) and len(plan._compiled) == 1)

    with patch.object(LaunchPlan, "__call__", launch_twice):
        call()
    return len(is_equal) == 4 and all(is_equal)


def compare_alignments() -> dict[str, bool]:
    """Return whether a plan compiles once per alignment, and unaligned pointers get scalar loads.

    ``cp.async`` and vector loads of an unaligned address would be errors on a GPU.
    """
    flat = torch.randn(16 * 64 * 14 * 14 + 1)
    aligned, unaligned = flat[:-1], flat[1:]
    layout = NCSLayout.contiguous((16, 64, 196))
    plan = launcher.plan_launch("moments", layout, flat.device, (flat.dtype, torch.float64))
    moments = torch.empty(129, dtype=torch.float64)
    counts = []
    for x in (aligned, aligned.clone(), unaligned, unaligned, aligned):
        plan(x_ptr=x, moments_ptr=moments, **plan.new_workspace())
        counts.append(len(plan._compiled))
    vector, scalar = (describe(kernel)["accesses"] for kernel in plan._compiled.values())
    return {
        "one kernel per alignment": counts == [1, 1, 2, 2, 2],
        "vector loads of aligned pointers": "cp.async 16" in vector and "cp.async 4" not in vector,
        "scalar loads of others": "cp.async 4" in scalar and "cp.async 16" not in scalar,
    }


def switches_device(launches: list[Launch]) -> bool:
    """Return whether a launch is on the device of its tensors while another one is current."""
    current: list[int | None] = [1]

    @contextmanager
    def switch(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    with (
        patch.object(torch.cuda, "current_device", lambda: current[0]),
        patch.object(torch.cuda, "device", switch),
    ):
        KERNEL.moments(torch.randn(3, 5, 7, 7))
    return launches[-1].device is None and current == [1]


def main() -> None:
    """Compare for vector and scalar accesses, other dtypes, empty inputs and shared channels."""
    large, weight = torch.randn(16, 64, 14, 14), torch.ones(64)
    cases = {
        "contiguous": (large, weight),
        "channels_last": (
            large.bfloat16().to(memory_format=torch.channels_last),
            weight.bfloat16(),
        ),
        "odd sizes": (torch.randn(3, 5, 7, 7), torch.ones(5)),
        "no values": (torch.randn(0, 5, 7, 7), torch.ones(5)),
        "shared channels": (torch.randn(64, 4, 32, 32), torch.ones(4)),
    }
    with compile_for(90) as launches:
        results = {
            name: repeats_launches(launches, partial(run_layer, *tensors))
            for name, tensors in cases.items()
        }
        results |= compare_alignments()
        results["another device"] = switches_device(launches)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
