"""Locks that a forward pass holds at a batch-norm layer.

Lockstep suspends a pass at a layer and starts the next one in the same thread. If the first pass
holds a lock there, the next pass waits for it forever. No timeout can end this wait: it blocks the
only thread. So the locks are looked up while a single pass runs.
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

from syncbn.calibration.layers import Layer

# References from a module or a variable to a lock, such as: exit stack, its variables, its queue,
# entry, method, lock.
_DEPTH = 8
# Longer containers hold data.
_LONGEST = 1000
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# A semaphore with more permits counts as free. An RLock has any number for its own thread.
_MOST_PERMITS = 64
# Models may refer to a whole program; a search of so many objects takes 0.1 s.
_MOST_OBJECTS = 100_000
_LEAVES = (
    Tensor, torch.Generator, type, types.ModuleType, types.FrameType, types.CodeType,
    str, bytes, int, float, *weakref.ProxyTypes,
)  # fmt: skip


class LockWatch:
    """Finds the locks that a forward pass acquires before a layer and releases after it.

    Locks are searched in the attributes of all modules, and in the variables of the functions that
    run at the layer: locals, closures and globals. Queues, files and locks inside of compiled
    extensions are not found.

    Args:
        model: root of the modules whose attributes are searched.
        run: a forward pass. Frames of its callers are not searched.
    """

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        self._run = run
        modules = list(model.modules())
        self._known = list(_find_locks(modules))
        self._searched = {id(module) for module in modules}
        self._outside: types.FrameType | None = None
        self._thread = threading.get_ident()
        self._free: dict[int, tuple[Any, int, str]] = {}

    def run(self) -> None:
        """Run the pass; :meth:`record_permits` must be called at each layer."""
        self._outside = sys._getframe()
        try:
            self._run()
        finally:
            self._outside = None

    def record_permits(self, layer: Layer) -> None:
        """Record the free permits of all locks at a layer."""
        if threading.get_ident() != self._thread:
            return  # lockstep refuses layers in other threads
        for lock in (*self._known, *_find_locks(self._variables(), self._searched)):
            permits = _free_permits(lock)
            if permits < self._free.get(id(lock), (lock, _MOST_PERMITS, ""))[1]:
                self._free[id(lock)] = lock, permits, layer.name

    def held(self) -> str | None:
        """Return where the pass held a lock, once it has ended; None if it held none."""
        for lock, permits, name in self._free.values():
            if _free_permits(lock) > permits:
                return f"{name}: the forward holds a {type(lock).__name__} there"
        return None

    def _variables(self) -> Iterator[Any]:
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._outside:
            if not _is_library(frame.f_globals.get("__name__")):
                yield from frame.f_locals.values()
                yield from _globals_of(frame.f_code, frame.f_globals)
            frame = frame.f_back


def _lock_types() -> tuple[type, ...]:
    found: list[Any] = [type(threading.Lock()), threading.Semaphore, threading.Condition]
    processes: Any = sys.modules.get("multiprocessing.synchronize")
    if processes is not None:
        found.append(processes.SemLock)
    return tuple(found)


def _free_permits(lock: Any) -> int:
    number = 0
    while number < _MOST_PERMITS and lock.acquire(False):
        number += 1
    for _ in range(number):
        lock.release()
    return number


def _find_locks(roots: Iterable[Any], skipped: Collection[int] = ()) -> Iterator[Any]:
    kinds = _lock_types()
    waiting = deque((root, 0) for root in roots)
    seen = set(skipped)
    keep: list[Any] = []  # ids are of living objects only
    while waiting and len(keep) < _MOST_OBJECTS:
        thing, depth = waiting.popleft()
        if id(thing) in seen or issubclass(type(thing), _LEAVES):
            continue
        seen.add(id(thing))
        keep.append(thing)
        if issubclass(type(thing), kinds):
            yield thing
        elif depth < _DEPTH:
            waiting.extend((child, depth + 1) for child in _referents(thing, kinds))


def _referents(thing: Any, kinds: tuple[type, ...]) -> Iterable[Any]:
    """Return the objects to which an object refers; runs none of its code."""
    kind = type(thing)
    if issubclass(kind, types.FunctionType):
        if _is_library(thing.__module__):
            return ()
        # Not all global variables: these are a whole program.
        own = (thing.__closure__, thing.__defaults__, thing.__kwdefaults__)
        return (*own, *_globals_of(thing.__code__, thing.__globals__))
    for container in _CONTAINERS:
        if issubclass(kind, container):
            return gc.get_referents(thing) if container.__len__(thing) <= _LONGEST else ()
    # Methods of classes are searched only if they run.
    kinds = (*kinds, *_CONTAINERS)
    shared = (v for c in kind.__mro__ for v in vars(c).values() if issubclass(type(v), kinds))
    return (*gc.get_referents(thing), *shared)


def _globals_of(code: types.CodeType, variables: dict[str, Any]) -> Iterator[Any]:
    """Yield the global variables of a function, and the attributes of modules that it names."""
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
