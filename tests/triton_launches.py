"""Compare launches by the driver with Triton's own, on a driver that launches nothing.

``python -m tests.triton_launches`` compiles that driver, with a compiler and what Triton has of
CUDA's headers; and prints as JSON, for each case, whether it is told the same by both: arguments,
addresses among them, and how many programs, threads and bytes of shared memory there are.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any
from unittest.mock import patch
from weakref import ref

import torch
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from syncbn.kernels import Forward, Running, Transform, triton
from syncbn.kernels.triton import launcher as triton_launch
from syncbn.kernels.triton.driver import Calls
from syncbn.kernels.triton.launcher import Launch

SOURCE = Path(__file__).with_name("recording_driver.c")
MOST, STREAM, OF_A_THREAD = 64, 7, 2
# What a kernel's arguments are in PTX, and their bytes.
PARAMETER = re.compile(r"\.param \.([ubf])(\d+)[^,)]*_param_\d+")


class Record(ctypes.Structure):
    """Of recording_driver.c."""

    _fields_ = (
        ("name", ctypes.c_char * MOST),
        ("numbers", ctypes.c_uint64 * 12),
        ("arguments", ctypes.c_uint64 * MOST),
    )


def build(folder: Path) -> ctypes.CDLL:
    """Compile the driver, and load it before anybody looks for another."""
    library = folder / "libcuda.so.1"
    include = Path(nvidia.__file__).parent / "include"
    compiler = os.environ.get("CC", "gcc")
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Wextra", f"-I{include}", str(SOURCE)]
    subprocess.run([*command, f"-Wl,-soname,{library.name}", "-o", str(library)], check=True)
    # What Triton links its launchers with.
    (folder / "libcuda.so").symlink_to(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def active(stream: int = 0, is_capturing: bool = False) -> Iterator[None]:
    """Have everything launched on a stream, by the driver that has been loaded."""
    from triton.backends.nvidia.driver import CudaDriver

    class OnStream(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.get_current_stream = lambda _: stream
            self.get_current_device = lambda: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver.set_active(OnStream())
    with (
        patch.object(triton_launch, "_current_device", lambda: None),
        patch.object(triton_launch, "_current_stream", lambda _: stream),
        patch.object(triton_launch, "_is_capturing", lambda: is_capturing),
    ):
        yield


class Recorder:
    """The driver that has been loaded, as tests see it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._records = (Record * MOST).in_dll(library, "records")

    def refuse(self, launches: int, error: int = 1) -> None:
        """Have the next launches refused with an error."""
        self.number("errors").value = launches
        self.number("error").value = error

    def told(self, call: Callable[[], object]) -> list[tuple[Any, ...]]:
        """Return what the driver is told to launch during a call."""
        recorded = self.number("recorded")
        recorded.value = 0
        call()
        found = self._records[: recorded.value]
        recorded.value = -1
        return [(r.name, *r.numbers, *r.arguments) for r in found]

    def number(self, name: str) -> ctypes.c_int:
        """Return a variable of the driver."""
        return ctypes.c_int.in_dll(self._library, name)

    def is_told_the_same(self, call: Callable[[], object]) -> bool:
        """Return whether launches of a call are those that Triton makes of them."""
        seen: list[tuple[Any, ...]] = []
        run = Launch.__call__

        def noted(launch: Launch, *given: Any) -> None:
            seen.append((launch, *given))
            run(launch, *given)

        with patch.object(Launch, "__call__", noted):
            call()
        return bool(seen) and all(self._is_same(*each) for each in seen)

    def _is_same(
        self, launch: Launch, tensors: tuple[Tensor | None, ...], floats: tuple[float, ...] = ()
    ) -> bool:
        stream = triton_launch._current_stream(None)
        shared = triton_launch._memory(launch.device, stream).of(launch.shared)
        for kernel in launch._by_triton(tensors, floats, shared):
            entry = kernel.asm["ptx"].partition(".entry")[2].partition("{")[0]
            for i, (_, bits) in enumerate(PARAMETER.findall(entry)):
                # Of recording_driver.c's Function.
                sizes = (ctypes.c_int * MOST).from_address(kernel.function + MOST)
                sizes[i] = int(bits) // 8
        assert launch._calls
        by_triton = self.told(lambda: launch._by_triton(tensors, floats, shared))
        by_us = self.told(lambda: launch(tensors, floats))
        return len(by_us) == len(launch.steps) and by_us == by_triton


def functions(x: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    """Return calls of all functions."""
    running = Running(weight.clone(), weight.clone(), torch.tensor(3), 0.1)
    gate, message = triton.new_gate(x), triton.moments(x)
    how = Forward(1e-5, weight, None, True, running, gate)
    _, statistics = triton.normalize(x, message, how, x)
    transform, sums = Transform(statistics, weight, weight), message[:-1].clone()
    given = x, gate, x, transform, (weight, None)
    return {
        "moments": lambda: triton.moments(x),
        "normalize": lambda: triton.normalize(x, message, how, x),
        "forward_alone": lambda: triton.forward_alone(x, how, x),
        "backward_reduce": lambda: triton.backward_reduce(x, x, transform, (weight, weight)),
        "backward_reduce_gated": lambda: triton.backward_reduce_gated(*given),
        "backward_elemt": lambda: triton.backward_elemt(x, x, transform, sums),
        "backward_alone": lambda: triton.backward_alone(x, x, transform, (weight, weight)),
        "backward_alone_gated": lambda: triton.backward_alone_gated(*given),
        "through_gate": lambda: triton.through_gate(x, gate, x),
        "opened": lambda: triton.opened(gate, x),
    }


def refusals(recorder: Recorder, call: Callable[[], object]) -> dict[str, bool]:
    """Return whether Triton launches what the driver has refused, or says why not."""
    call()
    wanted = recorder.told(call)
    recorder.refuse(1)
    found = recorder.told(call)
    recorder.refuse(2)
    said = ""
    try:
        call()
    except RuntimeError as error:
        said = str(error)
    recorder.refuse(0)
    return {
        "refused once": [told[0] for told in found] == [told[0] for told in wanted],
        "refused": "an error of the tests" in said,
        "refused no more": recorder.told(call)[0][0] == wanted[0][0],
    }


def threads(recorder: Recorder, call: Callable[[], object], passes: int) -> dict[str, bool]:
    """Return whether two threads that come to a stream first share it, a pass after the other."""
    together, make = Barrier(2), triton_launch._Memory.__init__
    made: list[Any] = []

    def slowly(memory: Any, device: torch.device) -> None:
        made.append(memory)
        time.sleep(0.01)
        make(memory, device)

    def run(_: int) -> None:
        together.wait()
        for _ in range(passes):
            call()

    with patch.object(triton_launch._Memory, "__init__", slowly), ThreadPoolExecutor(2) as pool:
        recorder.number("delay").value = 300
        told = recorder.told(lambda: list(pool.map(run, range(2))))
        recorder.number("delay").value = 0
    names = [launch[0] for launch in told]
    pair = names[:2] * 2 * passes
    return {"threads take turns": names[0] != names[1] and names == pair, "one": len(made) == 1}


def owned(call: Callable[[], object], stream: int) -> dict[str, bool]:
    """Return whether launches that are kept keep what their addresses are of."""
    with active(stream):
        call()
    memory = ref(triton_launch._memory(torch.device("cpu"), stream))
    triton_launch._memory_of.cache_clear()
    gc.collect()
    return {"memory is owned": memory() is not None}


def captures(recorder: Recorder, call: Callable[[], object]) -> dict[str, bool]:
    """Return whether a graph that is captured has memory of its own for what programs share."""
    (plain,) = recorder.told(call)
    with active(STREAM, is_capturing=True):
        (captured,) = recorder.told(call)
    differ = [a != b for a, b in zip(plain, captured, strict=True)]
    # What they share, and what they return: parts, arrivals, message.
    is_own = plain[0] == captured[0] and sum(differ) >= 2
    kept = triton_launch._memory_of.cache_info()
    with active(OF_A_THREAD):
        call()
    return {"captured": is_own, "a thread's": triton_launch._memory_of.cache_info() == kept}


def devices(recorder: Recorder, call: Callable[[], object]) -> dict[str, bool]:
    """Return whether launches are on the tensors' device, whichever is the current one."""
    current: list[int | None] = [1]

    @contextmanager
    def switched(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    seen: list[int | None] = []
    run = Calls.__call__

    def noted(*given: Any) -> int:
        seen.append(current[0])
        return run(*given)

    with (
        patch.object(triton_launch, "_current_device", lambda: current[0]),
        patch.object(torch.cuda, "device", switched),
        patch.object(Calls, "__call__", noted),
    ):
        told = recorder.told(call)
    return {"another device": len(told) == 1 and seen == [None] and current == [1]}


def main() -> None:
    """Compare all functions: for vectors, single values, other dtypes and unaligned memory."""
    flat = torch.randn(2 * 64 * 14 * 14 * 8 + 1)
    large, few_channels = flat[:-1].view(16, 64, 14, 14), torch.randn(64, 4, 32, 32)
    last = large.to(memory_format=torch.channels_last)
    cases = {
        "contiguous": (large, torch.ones(64)),
        "channels_last": (last, torch.ones(64)),
        "bfloat16": (large.bfloat16(), torch.ones(64)),
        "bfloat16 weights": (large.bfloat16(), torch.ones(64).bfloat16()),
        "unaligned": (flat[1:].view(16, 64, 14, 14), torch.ones(64)),
        "unaligned weights": (large, flat[1:65]),
        "odd": (torch.randn(3, 5, 7, 7), torch.ones(5)),
        "no values": (torch.randn(0, 5, 7, 7), torch.ones(5)),
        "shared channels": (few_channels, torch.ones(4)),
    }
    overlapping = {"PDL": True, "launch_pdl": True}
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(build(Path(folder)))
        with active(STREAM):
            found = {
                f"{case}: {name}": recorder.is_told_the_same(call)
                for case, (x, weight) in cases.items()
                for name, call in functions(x, weight).items()
            }
            found |= refusals(recorder, lambda: triton.moments(large))
            found |= captures(recorder, lambda: triton.moments(few_channels))
            found |= devices(recorder, lambda: triton.moments(large))
        with active(STREAM + 1):
            found["another stream"] = recorder.is_told_the_same(lambda: triton.moments(large))
            call = functions(few_channels, torch.ones(4))["forward_alone"]
        with active(STREAM + 3):
            found |= threads(recorder, call, 15)
        found |= owned(lambda: triton.moments(few_channels), STREAM + 2)
        with active(STREAM), patch.object(triton_launch, "_overlap", lambda _: overlapping):
            call = functions(large.bfloat16(), torch.ones(64))["backward_alone"]
            found["overlapping"] = recorder.is_told_the_same(call)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
