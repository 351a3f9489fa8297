"""Memory of suspended forward passes, predicted from the profile of one pass."""

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

from syncbn.calibration.batches import copy_batch, count_samples, default_forward, slice_batch
from syncbn.calibration.context import CalibrationContext, hook_inputs
from syncbn.calibration.locks import LockDetector
from syncbn.calibration.model_state import get_rng_states
from syncbn.nn.bn_layers import BNLayer

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_GIB = 1 << 30
_TF32_EPS = 2.0**-10
# One sample in 16 of the first batch is enough to measure a pass.
_PROFILED_FRACTION = 16
# Tags of item(), bool(tensor) and similar; of nonzero() and similar.
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class ForwardProfile(NamedTuple):
    """Properties of a forward pass.

    Attributes:
        bytes: maximum memory allocated by the pass and alive at a layer.
        reads_data: True if the pass reads tensor values on the CPU or has data-dependent shapes.
        draws: True if the pass draws random numbers from the global generators.
        eps: machine epsilon of the coarsest floating dtype among the results.
        lock: layer and type of a lock held at a layer, as text; None without one.
    """

    bytes: int
    reads_data: bool
    draws: bool
    eps: float
    lock: str | None = None


def profile_forward(
    run: Callable[[], object],
    layers: Sequence[BNLayer],
    hook: Callable[[BNLayer], None] = lambda layer: None,
) -> ForwardProfile:
    """Run a forward pass and return its profile.

    Args:
        run: forward pass.
        layers: layers at which passes will be suspended.
        hook: function called at each layer.
    """
    peak = 0
    states = get_rng_states()
    with MemoryTracker() as tracker:

        def measure(layer: BNLayer, x: Tensor) -> None:
            nonlocal peak
            peak = max(peak, tracker.live_bytes())
            hook(layer)

        with hook_inputs(layers, measure):
            run()
    return ForwardProfile(peak, tracker.reads_data, get_rng_states() != states, tracker.eps)


class MemoryBudget:
    """Memory of the suspended passes of this rank.

    Args:
        context: inputs of the calibration.
    """

    def __init__(self, context: CalibrationContext) -> None:
        self._context = context
        self._profile: ForwardProfile | None = None

    def reset(self, batch: Any) -> ForwardProfile:
        """Release all reservations; return the profile of a pass over the first batch.

        The first call runs the pass, and later calls return the same profile.

        Args:
            batch: first batch.
        """
        self._samples, self._expected = 0, self._context.batches.expected_samples()
        if self._profile is not None:
            return self._profile
        size = count_samples(batch) or 1
        # A user's forward may need whole batches.
        is_default = self._context.forward is default_forward
        part = max(1, size // _PROFILED_FRACTION) if is_default else size
        try:
            self._profile = self._measure(slice_batch(batch, part, size), part)
        except Exception:
            if part == size:
                raise
            self._profile = self._measure(batch, size)  # the model may need whole batches, too
        return self._profile

    def reserve(self, batch: Any) -> None:
        """Reserve memory for a batch.

        Raises:
            MemoryError: this batch, or all expected batches, exceed the limit.
        """
        self._samples += count_samples(batch) or 1
        samples = max(self._samples, self._expected)
        needed = self._bytes_per_sample * samples
        limit = self._context.max_bytes
        if limit is None or needed <= limit:
            return
        raise MemoryError(
            f"method 'lockstep' would hold {needed / _GIB:.3g} GiB of activations for {samples} "
            f"samples on this rank, more than max_bytes={limit} ({limit / _GIB:.3g} GiB; the free "
            "memory by default); use method='sequential', which holds one batch and has the same "
            "result, or fewer samples (num_samples)"
        )

    def _measure(self, batch: Any, size: int) -> ForwardProfile:
        batch = copy_batch(batch)
        locks = LockDetector(self._context.model, partial(self._context.run, batch))
        profile = profile_forward(locks.run, self._context.layers, locks.record_permits)
        batch_bytes = sum(tensor.nbytes for tensor in _tensors(batch))
        self._bytes_per_sample = (profile.bytes + batch_bytes) / size
        return profile._replace(lock=locks.describe_held_lock())


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
        old = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            self.eps = max(self.eps, _rounding(tensor))
            storage = tensor.untyped_storage()
            if storage._cdata not in old:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device, or of this process on the CPU; None if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = _read_fields(_MEMINFO).get("MemAvailable:")
    limits = [] if free is None else [free * 1024]
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        # Pages of files that were read count as used. The kernel reclaims the inactive ones first.
        reclaimable = _read_fields(_CGROUP / "memory.stat").get("inactive_file", 0)
        limits.append(max(int(limit.read_text()) - int(used.read_text()) + reclaimable, 0))
    return min(limits, default=None)


def _read_fields(path: Path) -> dict[str, int]:
    """Return the first two columns of a file of the kernel; empty without the file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: int(value) for name, value, *_ in map(str.split, lines)}


def _rounding(tensor: Tensor) -> float:
    if not tensor.is_floating_point():
        return 0.0
    # On CUDA, convolutions round float32 to TF32 by default.
    least = _TF32_EPS if tensor.is_cuda and tensor.dtype == torch.float32 else 0.0
    return max(least, torch.finfo(tensor.dtype).eps)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (part for part in tree_iter(tree) if isinstance(part, Tensor))
