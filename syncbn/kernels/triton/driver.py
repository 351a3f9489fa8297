"""Launches by CUDA's driver, of what Triton has compiled.

Triton's own launcher takes 3 us of the host's time, and what is around it 15: they look at every
argument of every launch. Here the driver reads arguments from memory that stays, into which a call
writes what has changed: addresses and floats.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION.
_OVERLAPS = 6
# What kernels of some versions of Triton take besides: scratch memory, see is_plain().
_NULLS = 2
_FORMATS = {"fp32": "f4x", "fp64": "d"}


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("number_of_attributes", ctypes.c_uint),
    )


@dataclass(frozen=True)
class Compiled:
    """A kernel that Triton has compiled.

    Attributes:
        kernel: what Triton's launch of it returned.
        names: of the kernel's arguments, in order; and what a call knows them by.
        programs: to launch.
        given: arguments that stay: integers, by the latter.
    """

    kernel: Any
    names: dict[str, str]
    programs: int
    given: dict[str, int]

    @property
    def types(self) -> dict[str, str]:
        """What arguments have been compiled for, in order; constants are none."""
        signature, constants = self.kernel.src.signature, self.kernel.src.constants
        found = {known: signature.get(name, "constexpr") for name, known in self.names.items()}
        # Up to Triton 3.2, constants are in the signature, too.
        fixed = {self.names[name] for name in constants if isinstance(name, str)}
        return {k: kind for k, kind in found.items() if kind != "constexpr" and k not in fixed}


class Calls:
    """Launches of some kernels on a stream, one after the other.

    Args:
        kernels: in their order.
        addresses: names of the arguments that are addresses and change, in the order of a call.
        floats: names of the floats, which follow.
        stream: of the current device, as CUDA's handle.
        lock: held while the kernels of a call are launched: what they tell each other is in memory
            of the stream, and the memory that the driver reads is of this object. Whoever holds it
            launches, and calls nobody who might come back.
        owner: of memory whose addresses the kernels are given.
    """

    def __init__(
        self,
        kernels: Sequence[Compiled],
        addresses: Sequence[str],
        floats: Sequence[str],
        stream: int,
        lock: threading.Lock,
        owner: object,
    ) -> None:
        types = ChainMap(*(kernel.types for kernel in kernels))
        formats = "".join(_FORMATS[types.get(name, "fp64")] for name in floats)
        self._pack = struct.Struct(f"={len(addresses)}Q{formats}").pack_into
        changing = {name: i for i, name in enumerate((*addresses, *floats))}
        given = [number for k in kernels for number in k.given.values()]
        # Eight bytes for each argument; the last are zero.
        self._arguments = (ctypes.c_int64 * (len(changing) + len(given) + 1))(
            *([0] * len(changing)), *given
        )
        # Code and memory are there as long as these are.
        self._owned: list[object] = [kernels, owner]
        self._lock = lock
        self._launch = _launch_kernel()
        self._launches = []
        first = len(changing)
        for kernel in kernels:
            places = changing | {name: first + i for i, name in enumerate(kernel.given)}
            self._launches.append(self._launch_of(kernel, places, stream))
            first += len(kernel.given)

    def __call__(self, addresses: Sequence[int], floats: Sequence[float]) -> int:
        """Launch; return CUDA's error, or zero."""
        with self._lock:
            self._pack(self._arguments, 0, *addresses, *floats)
            for arguments in self._launches:
                error: int = self._launch(*arguments)
                if error:
                    return error
        return 0

    def _launch_of(self, kernel: Compiled, places: dict[str, int], stream: int) -> tuple[Any, ...]:
        """Return the arguments of cuLaunchKernelEx."""
        taken = [places[name] for name in kernel.types]
        start, nothing = ctypes.addressof(self._arguments), len(self._arguments) - 1
        addresses = [start + 8 * place for place in (*taken, *[nothing] * _NULLS)]
        metadata = kernel.kernel.metadata
        config = _Config(
            grid=(kernel.programs, 1, 1),
            block=(32 * metadata.num_warps, 1, 1),
            shared_bytes=metadata.shared,
            stream=stream,
        )
        if getattr(metadata, "launch_pdl", False):
            config.attributes = ctypes.pointer(_Attribute(id=_OVERLAPS, value=1))
            config.number_of_attributes = 1
        arguments = (ctypes.c_void_p * len(addresses))(*addresses)
        self._owned += config, arguments
        return (
            ctypes.c_void_p(ctypes.addressof(config)),
            ctypes.c_void_p(kernel.kernel.function),
            ctypes.c_void_p(ctypes.addressof(arguments)),
            None,
        )


def is_plain(kernel: Any) -> bool:
    """Return whether a compiled kernel takes no more than it has arguments.

    Args:
        kernel: what Triton's launch of it returned; instrumented by a profiler, say.
    """
    metadata = kernel.metadata
    sizes = (f"{kind}_scratch_size" for kind in ("global", "profile"))
    return not any(getattr(metadata, size, 0) for size in sizes)


def version() -> int:
    """Return the CUDA that the driver is of: 12030 for 12.3."""
    found = ctypes.c_int()
    _driver().cuDriverGetVersion(ctypes.byref(found))
    return found.value


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _launch_kernel() -> Any:
    return _driver().cuLaunchKernelEx
