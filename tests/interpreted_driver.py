"""A driver for launches that are kept: Triton's interpreter does what they are told.

So tests of layers see, without a GPU, what whoever repeats launches tells kernels: which memory,
which numbers, in which order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import _lru_cache_wrapper
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from syncbn.autograd import node
from syncbn.kernels import triton, triton_driver, triton_launch, triton_passes
from syncbn.kernels.triton_launch import Launch, Step

STREAM = 7
_SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)


class _Function(NamedTuple):
    """What has been compiled: arguments that are passed, and what stands for constants."""

    step: Step
    dtypes: dict[str, torch.dtype | type]
    constants: dict[str, Any]


class Driver:
    """Keeps what has been launched.

    Attributes:
        launched: names of kernels, in order.
        errors: what went wrong in one of them.
    """

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.errors: list[BaseException] = []
        self._functions: list[_Function] = []
        self.launch = _SIGNATURE(self._launch)

    def compiled(self, step: Step, given: dict[str, Any], options: dict[str, Any]) -> Any:
        """Return what Triton's launch of a kernel would."""
        names = {own: known for own, known in step.names.items() if own not in options}
        arguments = {own: given.get(known) for own, known in names.items()}
        dtypes = {k: _kind(v) for k, v in arguments.items() if v is not None}
        nothing = {k: None for k, v in arguments.items() if v is None}
        self._functions.append(_Function(step, dtypes, options | nothing))
        signature = {k: "fp64" if kind is float else "i64" for k, kind in dtypes.items()}
        return SimpleNamespace(
            src=SimpleNamespace(signature=signature, constants={}),
            metadata=SimpleNamespace(num_warps=4, shared=0),
            function=len(self._functions),
        )

    def _launch(self, config: int, function: int, arguments: int, _: None) -> int:
        try:
            known = self._functions[function - 1]
            addresses = (ctypes.c_int64 * len(known.dtypes)).from_address(arguments)
            kinds = zip(addresses, known.dtypes.items(), strict=True)
            given = {name: _read(address, kind) for address, (name, kind) in kinds}
            self.launched.append(known.step.kernel.__name__)
            known.step.kernel[known.step.programs, 1, 1](**given, **known.constants)
        except BaseException as error:
            self.errors.append(error)
        return 0


def _kind(value: object) -> torch.dtype | type:
    return value.dtype if isinstance(value, Tensor) else type(value)


def _read(address: int, kind: torch.dtype | type) -> Any:
    if kind is float:
        return ctypes.c_double.from_address(address).value
    number = ctypes.c_int64.from_address(address).value
    if isinstance(kind, torch.dtype):
        # The first of the numbers there, as far as anybody knows.
        memory = (ctypes.c_char * kind.itemsize).from_address(number)
        return torch.frombuffer(memory, dtype=kind)
    return number


@contextmanager
def kept() -> Iterator[Driver]:
    """Have launches kept, and interpreted when they are repeated."""
    driver = Driver()
    by_triton = Launch._by_triton

    def compiling(launch: Launch, tensors: Any, floats: Any, shared: Any) -> list[Any]:
        by_triton(launch, tensors, floats, shared)
        given = dict(zip(launch.tensors, tensors, strict=True)) | dict(shared)
        given |= dict(zip(launch.floats, map(float, floats), strict=True))
        return [
            driver.compiled(step, given | step.sizes, step.options(launch.device))
            for step in launch.steps
        ]

    functions: dict[str, Callable[..., Any]] = {
        "_current_device": lambda: None,
        "_current_stream": lambda _: STREAM,
        "_is_capturing": lambda: False,
    }
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(patch.object(triton_launch, name, function))
        stack.enter_context(patch.object(triton_launch, "InterpretedFunction", type(None)))
        stack.enter_context(patch.object(Launch, "_by_triton", compiling))
        stack.enter_context(patch.object(triton, "current", triton_launch.current))
        stack.enter_context(patch.object(triton_driver, "_launch_kernel", lambda: driver.launch))
        _forget()
        yield driver
    _forget()
    assert not driver.errors, driver.errors


def _forget() -> None:
    """Forget launches that are kept, which are of this driver or of none."""
    node._plans.cache_clear()
    triton_launch._memory_of.cache_clear()
    for function in vars(triton_passes).values():
        if isinstance(function, _lru_cache_wrapper):
            function.cache_clear()
