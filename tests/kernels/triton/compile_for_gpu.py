"""Compile all launches of the Triton kernel for a GPU that is not here; print facts as JSON.

``python -m tests.kernels.triton.compile_for_gpu 80`` calls the kernel on CPU tensors with the
driver of :mod:`tests.kernels.triton.absent_gpu`: Triton compiles, and launches nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
import triton as triton_package

from syncbn.kernels.base import NormalizeArgs, RunningStats
from syncbn.kernels.triton import TritonKernel, tiling
from syncbn.kernels.triton.launcher import LaunchPlan
from tests.kernels.triton.absent_gpu import compile_for

Facts: TypeAlias = dict[str, Any]
# Shapes, and True for channels_last.
CASES = {
    "ResNet-50 NCHW": ((64, 64, 56, 56), False),
    "ResNet-50 NHWC": ((64, 64, 56, 56), True),
    "a multiple of four NCHW": ((16, 256, 14, 14), False),
    "a multiple of eight NHWC": ((16, 24, 14, 14), True),
    "odd NCHW": ((64, 512, 7, 7), False),
    "odd NHWC": ((3, 5, 7, 7), True),
    "one channel": ((1, 1, 64, 64), False),
    "small NCHW": ((1, 64, 1, 1), False),
    "small NHWC": ((2, 8, 3, 3), True),
    "wide NCHW": ((62, 64, 56, 56), False),
    "wide NHWC": ((62, 64, 56, 56), True),
    "no values": ((0, 32, 9, 7), False),
    "one value a sample": ((2, 1), False),
}


def describe(binary: Any) -> Facts:
    """Return the memory accesses of a compiled kernel, its registers and its spilled bytes."""
    accesses = re.findall(r"(?:ld|st)(?:\.volatile)?\.global[\w.:]*", binary.asm["ptx"])
    copies = re.findall(r"(cp\.async)\.c\w\.shared\.global [^;]*?, 0x(\w+)", binary.asm["ptx"])
    accesses += [f"{name} {int(size, 16)}" for name, size in copies]
    with tempfile.NamedTemporaryFile() as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = triton_package.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    match = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert match is not None, usage
    registers, stack, local = map(int, match.groups())
    return {"accesses": Counter(accesses), "registers": registers, "spilled": stack + local}


def run_layers(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> None:
    """Call the kernel as layers do: plain, with a ReLU, and with a residual and a ReLU."""
    kernel, x = TritonKernel(), torch.empty(shape, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias, mean, var = torch.empty(4, shape[1])
    running = RunningStats(mean, var, torch.tensor(0), 0.1)
    moments = kernel.moments(x)
    for relu, residual in ((False, None), (True, None), (True, x)):
        args = NormalizeArgs(1e-5, weight, bias, relu, running)
        _, saved = kernel.normalize(x, moments, args, residual)
        # Frozen inputs need no dy behind the mask; x alone takes its memory for dx.
        for needs_dx, needs_dresidual in ((True, True), (False, False)):
            output_mask = needs_dx, True, True, needs_dresidual
            reduced = kernel.backward_reduce(x, saved, output_mask)
            if needs_dx:
                kernel.backward_elemt(saved, reduced, reduced.sums)


def main() -> None:
    """Compile for the architecture of the command line: all cases for 90, two for the rest."""
    architecture = int(sys.argv[1])
    cases = [(torch.bfloat16, name) for name in CASES]
    others = [(torch.float32, name) for name in CASES if name.startswith(("ResNet", "odd"))]
    others += [(torch.float16, "one value a sample")]
    results: dict[str, list[Facts]] = {}
    launch = LaunchPlan.__call__
    for dtype, name in [*cases, *others] if architecture == 90 else cases[:2]:
        binaries: dict[int, tuple[str, Any]] = {}

        def record(plan: LaunchPlan, *values: Any, _found: Any = binaries) -> None:
            launch(plan, *values)
            for binary in plan._compiled.values():
                _found[id(binary)] = plan._kernel.__name__, binary

        # These shapes occur in no other case, since plans are cached.
        limit = 0 if name.startswith("wide") else tiling._INT32_LIMIT
        with (
            compile_for(architecture),
            patch.object(tiling, "_INT32_LIMIT", limit),
            patch.object(LaunchPlan, "__call__", record),
        ):
            run_layers(*CASES[name], dtype)
        results[f"{name}, {dtype}"] = [
            {"kernel": kernel, **describe(binary)} for kernel, binary in binaries.values()
        ]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
