"""Compare launches of kept kernels with Triton's own, by a driver that launches nothing.

``python -m tests.triton_launches`` prints as JSON, for each function and case, whether a second
call passes the driver what the first did, which Triton itself had prepared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton as triton_package
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from syncbn.kernels import Forward, Running, Transform, triton

LAUNCHED: list[list[Any]] = []


class Utilities:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        # Handles, registers, spills; and from 3.3 on threads.
        found = 1, 2, 32, 0, 1024
        return found[:4] if triton_package.__version__.startswith("3.2.") else found

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class Launcher:
    def __init__(self, source: Any, _: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, *arguments: Any) -> None:
        # Between the grid and what is the kernel's are stream, function, and hooks of profilers.
        own = [*arguments[:3], *arguments[9:]]
        plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in own]
        LAUNCHED.append([self.name, *plain])


class Driver(DriverBase):  # type: ignore[misc]
    launcher_cls, utils = Launcher, Utilities()

    def __init__(self) -> None:
        """Do without what a GPU has."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: Any = None) -> int:
        return 0

    def get_benchmarker(self) -> None: ...

    def get_empty_cache_for_benchmark(self) -> None: ...

    def clear_cache(self, _: Any) -> None: ...


def functions(x: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    """Return calls that write to the same memory each time, but for what they return."""
    mean, var = weight.clone(), weight.clone()
    running = Running(mean, var, torch.tensor(3), 0.1)
    gate, message = triton.new_gate(x), triton.moments(x)
    how = Forward(1e-5, weight, None, True, running, gate)
    _, statistics = triton.normalize(x, message, how, x)
    transform, sums = Transform(statistics, weight, weight), message[:-1].clone()
    return {
        "moments": lambda: triton.moments(x),
        "normalize": lambda: triton.normalize(x, message, how, x),
        "backward_reduce": lambda: triton.backward_reduce(x, x, transform, (weight, weight)),
        "backward_reduce_gated": lambda: triton.backward_reduce_gated(x, gate, x, transform),
        "backward_elemt": lambda: triton.backward_elemt(x, x, transform, sums),
        "opened": lambda: triton.opened(gate, x),
    }


def is_alike(call: Callable[[], object]) -> bool:
    """Return whether a call launches the same, kept or by Triton; but for addresses of outputs."""
    call()
    LAUNCHED.clear()
    call()
    for name, kept in vars(triton).items():
        if name.endswith("_launch"):
            kept.cache_clear()
    call()
    one, other = LAUNCHED
    same = [type(a) is type(b) for a, b in zip(one, other, strict=True)]
    numbers = [a == b for a, b in zip(one, other, strict=True) if not _is_address(a)]
    return all(same) and all(numbers)


def _is_address(argument: Any) -> bool:
    return isinstance(argument, int) and argument > 2**32


def main() -> None:
    """Compare all functions: for vectors, single values, other dtypes and unaligned memory."""
    driver.set_active(Driver())
    flat = torch.randn(2 * 64 * 14 * 14 * 8 + 1)
    large = flat[:-1].view(16, 64, 14, 14)
    cases = {
        "contiguous": (large, torch.ones(64)),
        "channels_last": (large.to(memory_format=torch.channels_last), torch.ones(64)),
        "bfloat16": (large.bfloat16(), torch.ones(64)),
        "bfloat16 weights": (large.bfloat16(), torch.ones(64).bfloat16()),
        "unaligned": (flat[1:].view(16, 64, 14, 14), torch.ones(64)),
        "odd": (torch.randn(3, 5, 7, 7), torch.ones(5)),
        "no values": (torch.randn(0, 5, 7, 7), torch.ones(5)),
    }
    found = {
        f"{case}: {name}": is_alike(call)
        for case, (x, weight) in cases.items()
        for name, call in functions(x, weight).items()
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
