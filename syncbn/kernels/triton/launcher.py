"""Launches of the Triton kernels: those of a pass, one after the other.

Triton compiles at the first launch, for addresses that are multiples of 16 or any, and what it has
compiled is called by :mod:`syncbn.kernels.triton.driver` from then on.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from math import gcd
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from syncbn.kernels.triton import driver as triton_driver
from syncbn.kernels.triton.driver import Calls, Compiled

# Bytes; Triton compiles for addresses that are multiples, or for any.
_ALIGNMENT = 16
# Of GPUs that prepare a launch during the one before, and of drivers that capture such launches.
_OVERLAPPING, _CAPTURING = (9, 0), 12030

# Streams that have memory; and calls that a launch keeps, one for each stream and alignment. torch
# has 65 streams of a device, but those of others come and go.
_KEPT = 128
# cudaStreamPerThread: a stream for each thread.
_OF_A_THREAD = 2
_MAKING = threading.Lock()

# What functions of torch.cuda call, once they have seen that CUDA is there and has been started.
# CPU builds of torch have none of them.
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_is_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)

#: Memory that launches of a stream share, by name: how many numbers of which dtype. Launches find
#: it as the ones before left it; integers are zeros at first.
Shared: TypeAlias = "Mapping[str, tuple[int, torch.dtype]]"
_Key = tuple[int | bool, ...] | int


@dataclass(frozen=True)
class Step:
    """A kernel with what it is told besides tensors and floats.

    Attributes:
        kernel: of :mod:`syncbn.kernels.triton.device`.
        programs: how many.
        sizes: the integers, by name.
        constants: by name, in capitals; and Triton's options. Those that the kernel has not are
            left out.
        standing_for: arguments that a pass knows by other names.
    """

    kernel: Any
    programs: int
    sizes: dict[str, int]
    constants: dict[str, Any]
    standing_for: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """Names of the kernel's arguments, and what the pass knows them by."""
        return {name: self.standing_for.get(name, name) for name in self.kernel.arg_names}

    def options(self, device: torch.device) -> dict[str, Any]:
        """Return the constants that the kernel has, and what Triton is told."""
        found = self.constants | _overlap(device)
        return {k: v for k, v in found.items() if k.islower() or k in self.kernel.arg_names}


@dataclass(eq=False)
class Launch:
    """The launches of a pass.

    Attributes:
        device: of the tensors.
        steps: kernels, in their order.
        tensors: names of those that a call gives, in its order.
        floats: names of the floats that follow.
        shared: what the steps, and programs of a step, tell each other.
    """

    device: torch.device
    steps: Sequence[Step]
    tensors: Sequence[str]
    floats: Sequence[str] = ()
    shared: Shared = field(default_factory=dict)
    _calls: dict[_Key, Calls] = field(default_factory=dict, init=False)
    _is_interpreted: bool = field(init=False)

    def __post_init__(self) -> None:
        self._is_interpreted = isinstance(self.steps[0].kernel, InterpretedFunction)

    def __call__(self, tensors: Sequence[Tensor | None], floats: Sequence[float] = ()) -> None:
        """Launch on the current stream of the device.

        Args:
            tensors: by the names that the launch has been made with, always of the same dtypes,
                and None where they were.
            floats: as well.
        """
        if self._is_interpreted:
            self._by_triton(tensors, floats, _new(self.shared, self.device))
            return
        index = self.device.index
        if index != _current_device():
            with torch.cuda.device(self.device):
                self(tensors, floats)
            return
        stream = _current_stream(index)
        if self.shared and (_is_capturing() or stream == _OF_A_THREAD):
            # A graph may be replayed beside whatever else runs then, and has memory of its own.
            self._by_triton(tensors, floats, _new(self.shared, self.device))
            return
        addresses = [t.data_ptr() for t in tensors if t is not None]
        key: _Key = stream
        if gcd(_ALIGNMENT, *addresses) != _ALIGNMENT:
            key = stream, *[address % _ALIGNMENT == 0 for address in addresses]
        calls = self._calls.get(key)
        # Where the driver refuses, Triton will say why.
        if calls is None or calls(addresses, floats):
            self._first(tensors, floats, stream, key)

    def _first(
        self,
        tensors: Sequence[Tensor | None],
        floats: Sequence[float],
        stream: int,
        key: _Key,
    ) -> None:
        """Launch, and keep how to do it again."""
        memory = _memory(self.device, stream)
        with memory.lock:
            shared = memory.of(self.shared)
            kernels = self._by_triton(tensors, floats, shared)
        if not all(map(triton_driver.is_plain, kernels)):
            return
        there = [name for name, t in zip(self.tensors, tensors, strict=True) if t is not None]
        fixed = {name: t.data_ptr() for name, t in shared.items()}
        compiled = [
            Compiled(kernel, step.names, step.programs, fixed | step.sizes)
            for step, kernel in zip(self.steps, kernels, strict=True)
        ]
        if len(self._calls) >= _KEPT:
            self._calls.clear()
        self._calls[key] = Calls(compiled, there, self.floats, stream, memory.lock, memory)

    def _by_triton(
        self,
        tensors: Sequence[Tensor | None],
        floats: Sequence[float],
        shared: Mapping[str, Tensor],
    ) -> list[Any]:
        """Launch as Triton does it; return what it has compiled."""
        given: dict[str, Any] = dict(zip(self.tensors, tensors, strict=True))
        given |= dict(zip(self.floats, floats, strict=True)) | dict(shared)
        found = []
        for step in self.steps:
            options = step.options(self.device)
            known = given | step.sizes
            names = {own: name for own, name in step.names.items() if own not in options}
            arguments = {own: known.get(name) for own, name in names.items()}
            found.append(step.kernel[step.programs, 1, 1](**arguments, **options))
        return found


class _Memory:
    """What launches of a stream share. They follow one another.

    Attributes:
        lock: held while a pass is launched, whose steps share it.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.Lock()
        self._device = device
        self._tensors: dict[tuple[str, int], Tensor] = {}

    def of(self, shared: Shared) -> dict[str, Tensor]:
        """Return tensors by name, the same each time."""
        for name, (size, dtype) in shared.items():
            if (name, size) not in self._tensors:
                # No more launches in a graph than it takes.
                make = torch.empty if dtype.is_floating_point else torch.zeros
                self._tensors[name, size] = make(size, dtype=dtype, device=self._device)
        return {name: self._tensors[name, size] for name, (size, _) in shared.items()}


def _memory(device: torch.device, stream: int) -> _Memory:
    # Of two threads that come to a stream first, both would make one.
    with _MAKING:
        return _memory_of(device, stream)


@lru_cache(maxsize=_KEPT)
def _memory_of(device: torch.device, stream: int) -> _Memory:
    return _Memory(device)


def _new(shared: Shared, device: torch.device) -> dict[str, Tensor]:
    return _Memory(device).of(shared)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return what a GPU can do, as CUDA numbers it."""
    return torch.cuda.get_device_capability(device)


@cache
def _overlap(device: torch.device) -> dict[str, bool]:
    """Return how launches begin: while the one before ends, where GPU and driver can."""
    can = device.type == "cuda" and capability(device) >= _OVERLAPPING
    if can and triton_driver.version() >= _CAPTURING:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
