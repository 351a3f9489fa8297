"""How much memory suspended forward passes will take, known before they take it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from syncbn.calibration.batches import copy, count_samples, default_forward, first_samples
from syncbn.calibration.intercept import intercepted
from syncbn.calibration.job import Job
from syncbn.calibration.layers import Layer
from syncbn.calibration.locks import LockWatch
from syncbn.calibration.randomness import generator_states

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_GIB = 1 << 30
_TF32_EPS = 2.0**-10
# Of a batch, one sample in so many is enough to see what it takes.
_PART_TO_MEASURE = 16
# Of operations: item(), bool(tensor) and their like; nonzero() and its like.
_READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Watched(NamedTuple):
    """What was seen of a forward pass.

    Attributes:
        bytes: the most memory of its own that it has when it comes to a layer.
        reads_data: True if the forward reads tensor values on the CPU or has data-dependent shapes.
        draws: True if it draws random numbers from the global generators.
        eps: machine epsilon of the coarsest floating dtype among its results.
    """

    bytes: int
    reads_data: bool
    draws: bool
    eps: float


def watch_pass(
    run: Callable[[], object],
    layers: Sequence[Layer],
    observe: Callable[[Layer], None] = lambda layer: None,
) -> Watched:
    """Run a forward pass to its end and look at it.

    Args:
        run: the pass.
        layers: where it will be stopped.
        observe: called at each layer.
    """
    peak = 0
    states = generator_states()
    with LiveBytes() as watch:

        def look(layer: Layer, x: Tensor) -> None:
            nonlocal peak
            peak = max(peak, watch.live_bytes())
            observe(layer)

        with intercepted(layers, look):
            run()
    return Watched(peak, watch.reads_data, generator_states() != states, watch.eps)


def tensor_bytes(batch: Any) -> int:
    """Return the size of the tensors in a batch."""
    return sum(tensor.nbytes for tensor in _tensors(batch))


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that a device, or this process on the CPU, can still get; None: unknown."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    known = [free for free in (_free_of_machine(), _free_of_container()) if free is not None]
    return min(known, default=None)


class Room:
    """The memory for the suspended passes of a rank.

    Args:
        job: the calibration.

    Attributes:
        lock: layer and type of a lock that a pass over the first batch held, as text; None for
            none.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._observed: Watched | None = None
        self.lock: str | None = None

    def start(self, first: Any) -> Watched:
        """Take no room yet; return measurements of a pass over the first batch, which runs once.

        Args:
            first: the first batch.
        """
        self._samples, self._expected = 0, self._job.batches.expected_samples()
        if self._observed is not None:
            return self._observed
        size = count_samples(first) or 1
        # A forward of the user's own may need its batches as they are.
        part = max(1, size // _PART_TO_MEASURE) if self._job.forward is default_forward else size
        try:
            self._observed = self._measure(first_samples(first, part, size), part)
        except Exception:
            if part == size:
                raise
            self._observed = self._measure(first, size)  # so may the model, for its shapes
        return self._observed

    def take(self, batch: Any) -> None:
        """Take room for a batch.

        Raises:
            MemoryError: there will not be enough for this one, or for all that are expected.
        """
        self._samples += count_samples(batch) or 1
        samples = max(self._samples, self._expected)
        needed = self._bytes_per_sample * samples
        allowed = self._job.max_bytes
        if allowed is None or needed <= allowed:
            return
        raise MemoryError(
            f"method 'lockstep' would hold {needed / _GIB:.3g} GiB of activations for {samples} "
            f"samples on this rank, more than max_bytes={allowed} ({allowed / _GIB:.3g} GiB; if "
            "not given, what is free); use method='sequential', which holds one batch and comes to "
            "the same result, or fewer samples (num_samples)"
        )

    def _measure(self, batch: Any, size: int) -> Watched:
        batch = copy(batch)
        locks = LockWatch(self._job.model, partial(self._job.run, batch))
        observed = watch_pass(locks.run, self._job.layers, locks.record_permits)
        self.lock = locks.held()
        self._bytes_per_sample = (observed.bytes + tensor_bytes(batch)) / size
        return observed


def _free_of_machine() -> int | None:
    if not _MEMINFO.exists():
        return None
    fields = (line.split() for line in _MEMINFO.read_text().splitlines())
    return next((int(field[1]) * 1024 for field in fields if field[0] == "MemAvailable:"), None)


def _free_of_container() -> int | None:
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return None
    return max(int(limit.read_text()) - int(used.read_text()) + _reclaimable(), 0)


def _reclaimable() -> int:
    # Of the files that were read, which count as used, what the kernel gives up first.
    fields = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    return next((int(field[1]) for field in fields if field[0] == "inactive_file"), 0)


class LiveBytes(TorchDispatchMode):
    """Knows the memory of everything that was computed and is still there."""

    def __init__(self) -> None:
        super().__init__()
        #: Whether anything has read values, or made shapes of them.
        self.reads_data = False
        #: Machine epsilon of the coarsest floating dtype among all results.
        self.eps = torch.finfo(torch.float64).eps
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def live_bytes(self) -> int:
        """Return how much that is now, without what there was before."""
        self._storages = {
            key: entry for key, entry in self._storages.items() if not entry[0].expired()
        }
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.reads_data = self.reads_data or not _READING.isdisjoint(func.tags)
        old = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            self.eps = max(self.eps, _rounding(tensor))
            storage = tensor.untyped_storage()
            if storage._cdata not in old:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result


def _rounding(tensor: Tensor) -> float:
    if not tensor.is_floating_point():
        return 0.0
    # On CUDA, convolutions round float32 to TF32 by default.
    least = _TF32_EPS if tensor.is_cuda and tensor.dtype == torch.float32 else 0.0
    return max(least, torch.finfo(tensor.dtype).eps)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (part for part in tree_iter(tree) if isinstance(part, Tensor))
