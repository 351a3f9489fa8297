"""Forward passes suspended at batch-norm layers, and the memory and locks that they hold there.

Each pass runs in a coroutine (greenlet), which can be suspended anywhere below the model's forward,
side by side in one thread. Threads took 1.5 to 3 times a plain pass for small batches. If a
suspended pass holds a lock, the next pass waits for it forever. A timeout cannot end this wait,
since it blocks the only thread. So the locks are found while a single pass runs.
"""

from __future__ import annotations

import contextvars
import gc
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from syncbn.nn.bn_layers import BNLayer

# Backends of scaled_dot_product_attention, selected by torch.nn.attention.sdpa_kernel.
_SDPA_BACKENDS = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)
_TF32_EPS = 2.0**-10
# Tags of item(), bool(tensor) and similar; of nonzero() and similar.
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Number of references from a module or a variable to a lock. A long chain: exit stack, its
# variables, its queue, entry, method, lock.
_MAX_DEPTH = 8
# Longer containers hold data.
_MAX_CONTAINER = 1000
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# A semaphore with more permits counts as free. An RLock has any number for its owner thread.
_MAX_PERMITS = 64
# Models may refer to a whole program; the search of this many objects takes 0.1 s.
_MAX_OBJECTS = 100_000
_LEAVES = (
    Tensor, torch.Generator, type, types.ModuleType, types.FrameType, types.CodeType,
    str, bytes, int, float, *weakref.ProxyTypes,
)  # fmt: skip


class ForwardCoroutine:
    """Forward pass that runs from one batch-norm layer to the next.

    Args:
        run: whole pass; it calls :func:`suspend` at the layers.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._greenlet = greenlet.greenlet(run)
        self._greenlet.gr_context = contextvars.copy_context()
        self._caller_state = self._state = _get_thread_state()
        self._inference = torch.is_inference_mode_enabled()

    def resume(self) -> tuple[BNLayer, Tensor] | None:
        """Run to the next layer; return it and its input ``[N, C, *]``, None at the end.

        Raises:
            BaseException: the pass raised.
        """
        # The pass may be within torch.autocast, which must not affect other passes.
        if self._state != self._caller_state:
            _set_thread_state(self._state)
        try:
            suspension = self._greenlet.switch()
        finally:
            self._state = _get_thread_state()
            if self._state != self._caller_state:
                _set_thread_state(self._caller_state)
        if self._greenlet.dead:
            return None
        layer, x = suspension
        if torch.is_inference_mode_enabled() != self._inference:
            raise ValueError(
                f"{layer.name}: called within torch.inference_mode(), which cannot be suspended; "
                "use torch.no_grad() in the forward, or method='sequential'"
            )
        return layer, x

    @property
    def is_suspended(self) -> bool:
        """True between the first layer and the end of the pass."""
        return bool(self._greenlet)

    def close(self) -> None:
        """End the pass early; its ``finally`` blocks run."""
        if self.is_suspended:
            self._greenlet.throw()


def suspend(layer: BNLayer, x: Tensor) -> None:
    """Suspend the current pass at a layer with an input; return when the pass is resumed.

    Raises:
        RuntimeError: the caller does not run in a :class:`ForwardCoroutine`.
    """
    parent = greenlet.getcurrent().parent
    if parent is None:
        raise RuntimeError(
            f"{layer.name}: called in another thread than the forward; expected a forward that "
            "calls its layers in the thread of its caller"
        )
    parent.switch((layer, x))


_ThreadState = list[tuple[Callable[..., object], tuple[Any, ...]]]


def _get_thread_state() -> _ThreadState:
    """Return the thread-local settings of torch, as setters and their arguments."""
    cuda = torch.cuda.is_initialized()
    state: _ThreadState = [(torch.set_grad_enabled, (torch.is_grad_enabled(),))]
    for kind in ("cpu", "cuda") if cuda else ("cpu",):
        state.append((torch.set_autocast_enabled, (kind, torch.is_autocast_enabled(kind))))
        state.append((torch.set_autocast_dtype, (kind, torch.get_autocast_dtype(kind))))
    if cuda:
        state.append((torch.cuda.set_device, (torch.cuda.current_device(),)))
    return state + [(enable, (is_enabled(),)) for is_enabled, enable in _SDPA_BACKENDS]


def _set_thread_state(state: _ThreadState) -> None:
    for setter, arguments in state:
        setter(*arguments)


class MemoryTracker(TorchDispatchMode):
    """Dispatch mode that tracks the memory of all results that are still alive.

    Attributes:
        reads_data: True if an operation had a data-dependent result or shape.
        eps: machine epsilon of the coarsest floating dtype among all results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads_data = False
        self.eps = torch.finfo(torch.float64).eps
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def live_bytes(self) -> int:
        """Return the bytes allocated since the start of the tracker and still alive."""
        self._storages = {
            key: entry for key, entry in self._storages.items() if not entry[0].expired()
        }
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.reads_data = self.reads_data or not _DATA_DEPENDENT.isdisjoint(func.tags)
        old = {tensor.untyped_storage()._cdata for tensor in find_tensors((args, kwargs))}
        for tensor in find_tensors(result):
            if tensor.is_floating_point():
                # On CUDA, convolutions round float32 to TF32 by default.
                is_tf32 = tensor.is_cuda and tensor.dtype == torch.float32
                eps = _TF32_EPS if is_tf32 else torch.finfo(tensor.dtype).eps
                self.eps = max(self.eps, eps)
            storage = tensor.untyped_storage()
            if storage._cdata not in old:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result


def find_tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested containers."""
    return [part for part in tree_leaves(tree) if isinstance(part, Tensor)]


class LockDetector:
    """Detector of locks that a forward pass acquires before a layer and releases after it.

    Locks are searched in the attributes of all modules, and in the variables of the functions that
    run at the layer: locals, closures and globals. Queues, files and locks within compiled
    extensions are not found.

    The function that makes the detector runs the pass; frames of its callers are not searched.

    Args:
        model: root of the modules whose attributes are searched.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._module_locks = list(_find_locks(modules))
        self._searched = {id(module) for module in modules}
        self._outer_frame = id(sys._getframe(1))  # a reference would keep its variables alive
        self._thread = threading.get_ident()
        self._least_permits: dict[int, tuple[Any, int, str]] = {}

    def record_permits(self, layer: BNLayer) -> None:
        """Record the free permits of all locks at a layer."""
        if threading.get_ident() != self._thread:
            return  # lockstep rejects layers in other threads
        for lock in (*self._module_locks, *_find_locks(self._variables(), self._searched)):
            permits = _count_permits(lock)
            if permits < self._least_permits.get(id(lock), (lock, _MAX_PERMITS, ""))[1]:
                self._least_permits[id(lock)] = lock, permits, layer.name

    def describe_held_lock(self) -> str | None:
        """Return the layer and type of a lock held there, after the pass; None without one."""
        for lock, permits, name in self._least_permits.values():
            if _count_permits(lock) > permits:
                return f"{name}: the forward holds a {type(lock).__name__} there"
        return None

    def _variables(self) -> Iterator[Any]:
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and id(frame) != self._outer_frame:
            if not _is_library(frame.f_globals.get("__name__")):
                yield from frame.f_locals.values()
                yield from _globals_of(frame.f_code, frame.f_globals)
            frame = frame.f_back


def _count_permits(lock: Any) -> int:
    number = 0
    while number < _MAX_PERMITS and lock.acquire(False):
        number += 1
    for _ in range(number):
        lock.release()
    return number


def _find_locks(roots: Iterable[Any], skipped: Collection[int] = ()) -> Iterator[Any]:
    kinds: tuple[Any, ...] = type(threading.Lock()), threading.Semaphore, threading.Condition
    if (processes := sys.modules.get("multiprocessing.synchronize")) is not None:
        kinds = (*kinds, processes.SemLock)
    queue = deque((root, 0) for root in roots)
    visited = set(skipped)
    alive: list[Any] = []  # an id is unique among living objects only
    while queue and len(alive) < _MAX_OBJECTS:
        value, depth = queue.popleft()
        if id(value) in visited or issubclass(type(value), _LEAVES):
            continue
        visited.add(id(value))
        alive.append(value)
        if issubclass(type(value), kinds):
            yield value
        elif depth < _MAX_DEPTH:
            queue.extend((child, depth + 1) for child in _referents(value, kinds))


def _referents(value: Any, kinds: tuple[type, ...]) -> Iterable[Any]:
    """Return the objects that an object refers to, without running its code."""
    kind = type(value)
    if issubclass(kind, types.FunctionType):
        if _is_library(value.__module__):
            return ()
        # Only the global variables that the function names: all of them are a whole program.
        variables = (value.__closure__, value.__defaults__, value.__kwdefaults__)
        return (*variables, *_globals_of(value.__code__, value.__globals__))
    for container in _CONTAINERS:
        if issubclass(kind, container):
            is_short = container.__len__(value) <= _MAX_CONTAINER
            return gc.get_referents(value) if is_short else ()
    # Attributes of classes, without methods: the variables of a method are searched if it runs.
    kinds = (*kinds, *_CONTAINERS)
    shared = (v for c in kind.__mro__ for v in vars(c).values() if issubclass(type(v), kinds))
    return (*gc.get_referents(value), *shared)


def _globals_of(code: types.CodeType, variables: dict[str, Any]) -> Iterator[Any]:
    """Yield the global variables of a function, and the module attributes that it names."""
    for name in code.co_names:
        value = variables.get(name)
        if issubclass(type(value), types.ModuleType):
            attributes = object.__getattribute__(value, "__dict__")
            if not _is_library(attributes.get("__name__")):
                yield from (attributes[n] for n in code.co_names if n in attributes)
        else:
            yield value


def _is_library(name: str | None) -> bool:
    return (name or "").split(".")[0] in ("torch", "syncbn")
