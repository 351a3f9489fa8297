"""Detection of locks that a forward pass holds at a batch-norm layer.

Lockstep suspends a pass at a layer and starts the next one in the same thread. If the first pass
holds a lock there, the next pass waits for it forever. A timeout cannot end this wait, since it
blocks the only thread. So the locks are found while a single pass runs.
"""

from __future__ import annotations

import gc
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.nn.bn_layers import BNLayer

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


class LockDetector:
    """Detector of locks that a forward pass acquires before a layer and releases after it.

    Locks are searched in the attributes of all modules, and in the variables of the functions that
    run at the layer: locals, closures and globals. Queues, files and locks within compiled
    extensions are not found.

    Args:
        model: root of the modules whose attributes are searched.
        forward: forward pass; the frames of its callers are not searched.
    """

    def __init__(self, model: nn.Module, forward: Callable[[], object]) -> None:
        self._forward = forward
        modules = list(model.modules())
        self._module_locks = list(_find_locks(modules))
        self._searched = {id(module) for module in modules}
        self._outer_frame: types.FrameType | None = None
        self._thread = threading.get_ident()
        self._least_permits: dict[int, tuple[Any, int, str]] = {}

    def run(self) -> None:
        """Run the pass, with calls of :meth:`record_permits` at its layers."""
        self._outer_frame = sys._getframe()
        try:
            self._forward()
        finally:
            self._outer_frame = None

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
        while frame is not None and frame is not self._outer_frame:
            if not _is_library(frame.f_globals.get("__name__")):
                yield from frame.f_locals.values()
                yield from _globals_of(frame.f_code, frame.f_globals)
            frame = frame.f_back


def _lock_types() -> tuple[type, ...]:
    kinds: list[Any] = [type(threading.Lock()), threading.Semaphore, threading.Condition]
    processes: Any = sys.modules.get("multiprocessing.synchronize")
    if processes is not None:
        kinds.append(processes.SemLock)
    return tuple(kinds)


def _count_permits(lock: Any) -> int:
    number = 0
    while number < _MAX_PERMITS and lock.acquire(False):
        number += 1
    for _ in range(number):
        lock.release()
    return number


def _find_locks(roots: Iterable[Any], skipped: Collection[int] = ()) -> Iterator[Any]:
    kinds = _lock_types()
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
