"""A driver for launches that are kept: Triton's interpreter does what it is told.

So tests of layers see, without a GPU, what whoever repeats launches tells kernels: which memory,
which numbers, in which order.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import _lru_cache_wrapper
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from syncbn.autograd import node
from syncbn.autograd.call import Call
from syncbn.kernels import triton, triton_driver, triton_launch, triton_passes
from syncbn.kernels.launched import is_launched
from syncbn.kernels.triton_launch import Launch, Step

_SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)


class _Function(NamedTuple):
    """What has been compiled: arguments that are passed, and what stands for constants.

    Triton compiles for addresses that are multiples of 16, or for any.
    """

    step: Step
    kinds: dict[str, torch.dtype | type]
    constants: dict[str, Any]
    is_aligned: bool


class Driver:
    """Launches, and notes what.

    Attributes:
        launched: names of kernels, in order.
        told: their arguments, by name; the addresses of tensors.
        stream: the current one.
        is_capturing: whether it captures a graph.
        refusals: how many of the next launches are refused.
        floats: what they are compiled as.
        errors: of kernels.
    """

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.told: list[dict[str, int | float]] = []
        self.stream = 7
        self.is_capturing = False
        self.refusals = 0
        self.floats = "fp64"
        self.errors: list[BaseException] = []
        self.launch = _SIGNATURE(self._launch)
        self._functions: list[_Function] = []

    def compiled(self, step: Step, given: dict[str, Any], constants: dict[str, Any]) -> Any:
        """Return what Triton's launch of a kernel would."""
        names = {own: known for own, known in step.names.items() if own not in constants}
        arguments = {own: given.get(known) for own, known in names.items()}
        kinds = {name: _kind(value) for name, value in arguments.items() if value is not None}
        nothing = {name: None for name, value in arguments.items() if value is None}
        is_aligned = _are_aligned(arguments.values())
        self._functions.append(_Function(step, kinds, constants | nothing, is_aligned))
        signature = {name: self.floats if kind is float else "i64" for name, kind in kinds.items()}
        return SimpleNamespace(
            src=SimpleNamespace(signature=signature, constants={}),
            metadata=SimpleNamespace(num_warps=4, shared=0),
            function=len(self._functions),
        )

    def _launch(self, _: int, function: int, arguments: int, extra: None) -> int:
        if self.refusals > 0:
            self.refusals -= 1
            return 1
        try:
            known = self._functions[function - 1]
            step, kinds, constants, _ = known
            self.launched.append(step.kernel.__name__)
            addresses = (ctypes.c_int64 * len(kinds)).from_address(arguments)
            told = {
                name: self._read(address, kind)
                for address, (name, kind) in zip(addresses, kinds.items(), strict=True)
            }
            self.told.append(told)
            given = {name: _found(number, kinds[name]) for name, number in told.items()}
            assert not known.is_aligned or _are_aligned(given.values()), told
            step.kernel[step.programs, 1, 1](**given, **constants)
        except BaseException as error:
            self.errors.append(error)
        return 0

    def _read(self, address: int, kind: torch.dtype | type) -> int | float:
        of: Any = ctypes.c_int64
        if kind is float:
            of = ctypes.c_double if self.floats == "fp64" else ctypes.c_float
        number: int | float = of.from_address(address).value
        return number


def _are_aligned(arguments: Iterable[object]) -> bool:
    return all(t.data_ptr() % 16 == 0 for t in arguments if isinstance(t, Tensor))


def _kind(value: object) -> torch.dtype | type:
    return value.dtype if isinstance(value, Tensor) else type(value)


def _found(number: Any, kind: torch.dtype | type) -> Any:
    if not isinstance(kind, torch.dtype):
        return number
    if number == 0:
        return torch.empty(0, dtype=kind)
    # Of what is there, a kernel asks where it begins.
    memory = (ctypes.c_char * kind.itemsize).from_address(number)
    return torch.frombuffer(memory, dtype=kind)


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

    replaced: list[tuple[Any, str, Any]] = [
        (triton_launch, "_current_device", lambda: None),
        (triton_launch, "_current_stream", lambda _: driver.stream),
        (triton_launch, "_is_capturing", lambda: driver.is_capturing),
        # What nothing is an instance of.
        (triton_launch, "InterpretedFunction", Driver),
        (Launch, "_by_triton", compiling),
        (triton, "current", triton_launch.current),
        (triton_driver, "_launch_kernel", lambda: driver.launch),
    ]
    with ExitStack() as stack:
        for where, name, what in replaced:
            stack.enter_context(patch.object(where, name, what))
        _forget()
        yield driver
    _forget()
    assert not driver.errors, driver.errors


def begin() -> None:
    """Launch by this driver what the node serves, until the end: all of it in a group of one."""
    # As on a CPU: of small gradients, too.
    patch.object(node, "SMALL_ON_GPU", 1 << 16).start()
    context = kept()
    driver = context.__enter__()
    atexit.register(context.__exit__, None, None, None)
    normalize, primed = node.normalize, set()

    def served(x: Tensor, *given: Any) -> Tensor:
        assert not driver.errors, driver.errors
        *others, call = given
        tensors = [x, *others]
        if (
            is_launched(call.kernel)
            and call.group is None
            and call.is_usual
            and x.numel() > x.shape[1] > 0
        ):
            about = [(t.dtype, t.stride(), t.requires_grad) for t in tensors if t is not None]
            running = call.running and [getattr(t, "dtype", t) for t in call.running]
            key = str((x.shape, about, call.relu, running))
            if key not in primed:
                primed.add(key)
                _prime(normalize, tensors, call)
        return normalize(x, *given)

    patch.object(node, "normalize", served).start()


def _prime(normalize: Callable[..., Tensor], tensors: list[Tensor | None], call: Call) -> None:
    """Normalize copies, and differentiate, so that the node knows what is launched."""
    copies = [t if t is None else t.detach().clone() for t in tensors]
    for copy, t in zip(copies, tensors, strict=True):
        if copy is not None and t is not None:
            copy.requires_grad_(t.requires_grad)
    with torch.enable_grad():
        for _ in range(2):
            y = normalize(*copies, call._replace(running=deepcopy(call.running)))
            if y.requires_grad:
                y.backward(torch.ones_like(y))


def _forget() -> None:
    """Forget launches, which are of this driver or of none."""
    triton_launch._memory_of.cache_clear()
    for function in vars(triton_passes).values():
        if isinstance(function, _lru_cache_wrapper):
            function.cache_clear()
