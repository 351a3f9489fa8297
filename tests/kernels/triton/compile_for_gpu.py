"""Compile the launches of the Triton kernel for a GPU that is not here; print facts as JSON.

``python -m tests.kernels.triton.compile_for_gpu 90 representative`` calls the kernel on CPU tensors
with the driver of :mod:`tests.kernels.triton.absent_gpu`: Triton compiles, and launches nothing.
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

from syncbn.kernels.activations import NAMES, Activation
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
    "odd NCHW": ((64, 512, 7, 7), False),
    "odd NHWC": ((3, 5, 7, 7), True),
    "small NHWC": ((2, 8, 3, 3), True),
    "wide NCHW": ((62, 64, 56, 56), False),
    "wide NHWC": ((62, 64, 56, 56), True),
    "no values": ((0, 32, 9, 7), False),
    "one value a sample": ((2, 1), False),
}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Each kind of memory access, offset and dtype once: a kernel takes a third of a second.
REPRESENTATIVE = [
    *((BF16, name) for name in CASES if name.startswith(("ResNet", "odd", "small", "wide"))),
    *((F32, "ResNet-50 NHWC"), (F32, "a multiple of four NCHW")),
    *((F16, "no values"), (F16, "one value a sample")),
]


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


def run_layers(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, variants: bool
) -> None:
    """Call the kernel as layers do: with a residual and a ReLU; as variants, also without."""
    kernel, x = TritonKernel(), torch.empty(shape, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias, mean, var = torch.empty(4, shape[1])
    running = RunningStats(mean, var, torch.tensor(0), 0.1)
    moments = kernel.moments(x)
    cases = ((Activation("relu"), x), (None, None), *((Activation(n), None) for n in NAMES))
    for activation, residual in cases if variants else cases[:1]:
        args = NormalizeArgs(1e-5, weight, bias, activation, running)
        _, saved = kernel.normalize(x, moments, args, residual)
        reduced = kernel.backward_reduce(x, saved, (True,) * 4)
        kernel.backward_elemt(saved, reduced, reduced.sums)
        if variants and residual is not None:
            # Frozen inputs need no dy behind the mask.
            kernel.backward_reduce(x, saved, (False, True, True, False))


def main(architecture: str, which: str) -> None:
    """Compile one case in bfloat16, or the "representative" ones, for an architecture."""
    cases = REPRESENTATIVE if which == "representative" else [(BF16, which)]
    results: dict[str, list[Facts]] = {}
    launch = LaunchPlan.__call__
    for dtype, name in cases:
        binaries: dict[int, tuple[str, Any]] = {}

        def record(plan: LaunchPlan, _binaries: Any = binaries, **values: Any) -> None:
            launch(plan, **values)
            for binary in plan._compiled.values():
                _binaries[id(binary)] = plan._kernel.__name__, binary

        # These shapes occur in no other case, since plans are cached.
        limit = 0 if name.startswith("wide") else tiling._INT32_LIMIT
        # Without a residual or a ReLU, the code is a part of the same code.
        variants = which == "representative" and (dtype, name) == cases[0]
        with (
            compile_for(int(architecture)),
            patch.object(tiling, "_INT32_LIMIT", limit),
            patch.object(LaunchPlan, "__call__", record),
        ):
            run_layers(*CASES[name], dtype, variants)
        results[f"{name}, {dtype}"] = [
            {"kernel": kernel, **describe(binary)} for kernel, binary in binaries.values()
        ]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
