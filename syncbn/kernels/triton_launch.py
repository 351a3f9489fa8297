"""Launches of the Triton kernels: what is compiled is kept, and called with addresses.

Triton looks at every argument of every call, to find what it has compiled for such: 15 us a launch,
several times what the launch itself takes the host. What changes between calls here are tensors, of
which dtypes and alignment count, and floats, which do not.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from syncbn.kernels.triton_addresses import HAS_PDL

# Bytes; Triton compiles for addresses that are multiples, or for any.
_ALIGNMENT = 16
# Of GPUs that prepare a launch during the one before, and of drivers that capture such launches.
_OVERLAPPING, _CAPTURING = (9, 0), 12030
# Of Triton that wants constants where it is called with addresses, too.
_CONSTANTS_TOO = (3, 3)

Key = tuple[torch.dtype | bool | None, ...]


@dataclass(eq=False)
class Launch:
    """A kernel with all that it is told besides tensors and floats.

    Attributes:
        kernel: of :mod:`syncbn.kernels.triton_kernels`.
        device: of the tensors.
        programs: how many.
        sizes: the integers, in the order of the kernel's arguments.
        constants: by name, in capitals; and Triton's options. Those that the kernel has not are
            left out.
    """

    kernel: Any
    device: torch.device
    programs: int
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    _compiled: dict[Key, Any] = field(default_factory=dict)
    _rest: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        constants = self.constants | _overlap(self.device)
        names = [name for name in self.kernel.arg_names if name in constants]
        options = {name: value for name, value in constants.items() if name.islower()}
        self.constants = {name: constants[name] for name in names} | options
        self._rest = self.sizes
        if _version(triton.__version__) >= _CONSTANTS_TOO:
            self._rest += tuple(self.constants[name] for name in names)

    def __call__(self, *tensors: Tensor | None, floats: tuple[float, ...] = ()) -> None:
        """Launch on the current stream of the device.

        Args:
            tensors: in the order of the kernel's arguments.
            floats: which follow them.
        """
        index = self.device.index
        if index is not None and index != torch.cuda.current_device():
            # Triton launches on the current device.
            with torch.cuda.device(self.device):
                self._launch(tensors, floats)
        else:
            self._launch(tensors, floats)

    def _launch(self, tensors: tuple[Tensor | None, ...], floats: tuple[float, ...]) -> None:
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        key: Key = tuple([None if t is None else t.dtype for t in tensors])
        bits = 0
        for address in addresses:
            bits |= address or 0
        if bits % _ALIGNMENT:
            key += tuple([(address or 0) % _ALIGNMENT == 0 for address in addresses])
        compiled = self._compiled.get(key)
        if compiled is None:
            grid = (self.programs, 1, 1)
            compiled = self.kernel[grid](*tensors, *floats, *self.sizes, **self.constants)
            if not is_interpreted(self.kernel):
                self._compiled[key] = compiled
            return
        # As Triton does itself, but for hooks of its profiler.
        stream = driver.active.get_current_stream(self.device.index)
        about = compiled.function, compiled.packed_metadata, None, None, None
        compiled.run(self.programs, 1, 1, stream, *about, *addresses, *floats, *self._rest)


def is_interpreted(kernel: Any) -> bool:
    """Return whether a kernel runs in Triton's interpreter."""
    return isinstance(kernel, InterpretedFunction)


def scratch(device: torch.device, numbers: int, zeros: int) -> tuple[Tensor, Tensor]:
    """Return memory for what programs of a launch tell each other, on the current stream.

    Launches on a stream follow one another, and share it.

    Args:
        device: where.
        numbers: how many float64 to write and read in a launch.
        zeros: how many int32, zero, and left so.
    """
    if device.type == "cpu":
        return _scratch(device, 0, numbers, zeros)
    if torch.cuda.is_current_stream_capturing():
        # A graph may be replayed beside whatever else runs then, and has its own.
        return _new_scratch(device, numbers, zeros)
    return _scratch(device, driver.active.get_current_stream(device.index), numbers, zeros)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return what a GPU can do, as CUDA numbers it."""
    return torch.cuda.get_device_capability(device)


@cache
def _scratch(device: torch.device, stream: int, numbers: int, zeros: int) -> tuple[Tensor, Tensor]:
    return _new_scratch(device, numbers, zeros)


def _new_scratch(device: torch.device, numbers: int, zeros: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(numbers, dtype=torch.float64, device=device),
        torch.zeros(zeros, dtype=torch.int32, device=device),
    )


@cache
def _overlap(device: torch.device) -> dict[str, bool]:
    """Return how launches begin: while the one before ends, where GPU and Triton can."""
    can = device.type == "cuda" and capability(device) >= _OVERLAPPING
    if can and HAS_PDL and _driver_version() >= _CAPTURING:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def _driver_version() -> int:
    """Return the CUDA that the driver is of: 12030 for 12.3."""
    found = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    return found.value


def _version(text: str) -> tuple[int, int]:
    """Return the first two numbers of a version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
