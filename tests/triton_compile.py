"""Compile what the Triton kernels would launch, for GPUs that are not here; print it as JSON.

``python -m tests.triton_compile 80`` runs the functions of syncbn.kernels.triton on tensors of
the CPU, and compiles each launch with the arguments it is given instead of starting it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partialmethod
from typing import Any
from unittest.mock import patch

import torch
import triton as triton_package
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncbn.kernels import Forward, Running, Transform, triton
from syncbn.kernels.triton import tiling as triton_tiles
from syncbn.kernels.triton.launcher import Launch, Step, _Memory

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
# Shapes, and whether channels are dense.
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


def compiled(step: Step, given: dict[str, Any], arch: int) -> Any:
    """Compile a kernel as it would be where it is launched."""
    kernel = step.kernel
    constants = step.constants | {"PDL": arch >= 90, "launch_pdl": arch >= 90}
    options = {name: constants.pop(name) for name in [*constants] if name.islower()}
    known = given | step.sizes | constants
    signature, fixed, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(step.names.values(), kernel.params, strict=True)):
        value = known.get(name)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], fixed[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            assert parameter.do_not_specialize_on_alignment, parameter.name
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        else:
            signature[parameter.name] = parameter.annotation_type
            assert parameter.annotation_type == "fp64", parameter.name
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton_package.compile(source, GPUTarget("cuda", arch, 32), options)


def facts(binary: Any) -> dict[str, Any]:
    """Return the accesses to memory in a compiled kernel, and the registers it needs."""
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
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return {"accesses": Counter(accesses), "registers": registers, "spilled": stack + local}


def passes(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    """Call every function as layers do: plain, with a ReLU, and with a residual and a ReLU."""
    x = torch.empty(shape, dtype=dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
    channels = shape[1]
    weight, bias, mean, var = torch.empty(4, channels)
    running = Running(mean, var, torch.tensor(0), 0.1)
    message = triton.moments(x)
    for relu, residual in ((False, None), (True, None), (True, x)):
        gate = None if residual is None else triton.new_gate(x)
        how = Forward(1e-5, weight, bias, relu, running, gate)
        _, statistics = triton.normalize(x, message, how, residual)
        transform = Transform(statistics, weight, bias, relu and residual is None)
        if gate is not None:
            triton.opened(gate, x)
            triton.through_gate(x, gate, x)
            for write in (True, False):
                triton.backward_reduce_gated(x, gate, x, transform, (weight, bias), write=write)
        sums, _, _ = triton.backward_reduce(x, x, transform, (weight, bias))
        triton.backward_elemt(x, x, transform, sums)


def main() -> None:
    """Compile for the architecture that the command line names: all cases for 90, else some."""
    architecture = int(sys.argv[1])
    found: dict[str, list[dict[str, Any]]] = {}
    cases = [(torch.bfloat16, name) for name in CASES]
    others = [(torch.float32, name) for name in CASES if name.startswith(("ResNet", "odd"))]
    others += [(torch.float16, "one value a sample")]
    for dtype, name in [*cases, *others] if architecture == 90 else cases[:2]:
        launches = found[f"{name}, {dtype}"] = []
        # The same shapes as elsewhere, but for a size of their own: launches are kept.
        widest = 0 if name.startswith("wide") else triton_tiles._WIDE
        with (
            patch.object(triton_tiles, "_WIDE", widest),
            patch.object(Launch, "__call__", partialmethod(note, launches, architecture)),
        ):
            passes(*CASES[name], dtype)
    json.dump(found, sys.stdout)


def note(
    launch: Launch,
    launches: list[dict[str, Any]],
    architecture: int,
    tensors: tuple[Tensor | None, ...],
    floats: tuple[float, ...] = (),
) -> None:
    """Add what the kernels of a launch are compiled to."""
    given: dict[str, Any] = dict(zip(launch.tensors, tensors, strict=True))
    given |= zip(launch.floats, floats, strict=True)
    given |= _Memory(launch.device).of(launch.shared)
    for step in launch.steps:
        about = facts(compiled(step, given, architecture))
        launches.append({"kernel": step.kernel.__name__, **about})


if __name__ == "__main__":
    main()
