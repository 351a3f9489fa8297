"""Checks of lockstep by single passes: memory and locks before it, equal layer inputs after it.

Lockstep interleaves the passes of several batches and coalesces small batches. Both change layer
inputs if a model keeps state between its layers, or if its samples depend on each other. Code
analysis cannot recognize all such models, so the statistics of samples are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.calibration.batches import copy_batch, count_samples, default_forward, slice_batch
from syncbn.calibration.context import CalibrationContext, hook_inputs
from syncbn.calibration.model import get_rng_states
from syncbn.calibration.suspension import LockDetector, MemoryTracker, find_tensors
from syncbn.nn.bn_layers import BNLayer
from syncbn.nn.sample_stats import SampleStats, sample_stats

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_GIB = 1 << 30
# One sample in 16 of the first batch is enough to measure a pass.
_PROFILED_FRACTION = 16
#: Number of passes that are traced. One is not enough: it may fill a cache that the second uses.
TRACED_PASSES = 2
# Allowance for the mean of coalesced batches far from zero, in roundings of the mean.
_ROUNDINGS = 32
# A repeated pass runs the same kernels on the same shapes: no difference was measured on CPU.
# Atomic additions on CUDA round in any order, hence 64 roundings; half precision has a lower limit,
# at which interference of 1 % is still found.
_MAX_REPEATED_ROUNDINGS, _MAX_REPEATED_DIFFERENCE = 64, 2.0**-8
_MAX_ROWS = 32


class ForwardProfile(NamedTuple):
    """Properties of a forward pass.

    Attributes:
        bytes_per_sample: maximum memory of the batch and of results alive at a layer.
        reads_data: True if the pass reads tensor values on the CPU or has data-dependent shapes.
        draws: True if the pass draws random numbers from the global generators.
        eps: machine epsilon of the coarsest floating dtype among the results.
        lock: layer and type of a lock held at a layer, as text; None without one.
    """

    bytes_per_sample: float
    reads_data: bool
    draws: bool
    eps: float
    lock: str | None

    def require_memory(self, samples: int, limit: int | None) -> None:
        """Raise unless suspended passes over a number of samples fit into a limit in bytes.

        Raises:
            MemoryError: they exceed the limit.
        """
        needed = self.bytes_per_sample * samples
        if limit is not None and needed > limit:
            raise MemoryError(
                f"method 'lockstep' would hold {needed / _GIB:.3g} GiB of activations for "
                f"{samples} samples on this rank, more than max_bytes={limit} "
                f"({limit / _GIB:.3g} GiB; the free memory by default); use method='sequential', "
                "which holds one batch and has the same result, or fewer samples (num_samples)"
            )


def profile_batch(context: CalibrationContext, batch: Any) -> ForwardProfile:
    """Return the profile of a pass over a part of a batch, or over all of it."""
    size = count_samples(batch) or 1
    # A user's forward may need whole batches.
    is_default = context.forward is default_forward
    part = max(1, size // _PROFILED_FRACTION) if is_default else size
    try:
        return _profile_pass(context, slice_batch(batch, part, size), part)
    except Exception:
        if part == size:
            raise
        return _profile_pass(context, batch, size)  # the model may need whole batches, too


def _profile_pass(context: CalibrationContext, batch: Any, samples: int) -> ForwardProfile:
    batch = copy_batch(batch)
    locks = LockDetector(context.model)
    peak, states = 0, get_rng_states()
    with MemoryTracker() as tracker:

        def measure(layer: BNLayer, x: Tensor) -> None:
            nonlocal peak
            peak = max(peak, tracker.live_bytes())
            locks.record_permits(layer)

        with hook_inputs(context.layers, measure):
            context.run(batch)
    peak += sum(tensor.nbytes for tensor in find_tensors(batch))
    draws = get_rng_states() != states
    lock = locks.describe_held_lock()
    return ForwardProfile(peak / samples, tracker.reads_data, draws, tracker.eps, lock)


def limit_memory(context: CalibrationContext) -> int | None:
    """Return the memory limit of a calibration on this rank in bytes; a collective."""
    sharing = context.ranks.ranks_per_device()
    free = free_bytes(context.pivots[0].device) if context.max_bytes is None else None
    return context.max_bytes if free is None else free // sharing


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


class InterferenceError(Exception):
    """Interleaved or coalesced passes have other layer inputs than single passes.

    Attributes:
        coalesced: True if a rank has coalesced small batches.
    """

    def __init__(self, reason: str, coalesced: bool = False) -> None:
        super().__init__(reason)
        self.coalesced = coalesced


class Trace:
    """Statistics of a batch's samples at every layer of its pass, in order.

    Args:
        batch: batch for a single pass.
        part: first sample of the batch and its end in the traced pass, and the number of samples
            there; None if the pass has this batch only.

    Attributes:
        entries: layers, and statistics of at most 32 rows of their inputs.
    """

    def __init__(self, batch: Any, part: tuple[int, int, int] | None = None) -> None:
        self.batch, self.part = batch, part
        self.entries: list[tuple[BNLayer, SampleStats]] = []

    def add(self, layer: BNLayer, x: Tensor) -> None:
        """Record an input, ``[N, C, *]``, where N is a multiple of the samples."""
        if self.part is not None:
            start, stop, samples = self.part
            x = x[len(x) * start // samples : len(x) * stop // samples]
        # Evenly spaced rows: the first rows of [time, batch, channels] are all of the first step.
        self.entries.append((layer, sample_stats(x[:: -(-len(x) // _MAX_ROWS) or 1])))


def make_traces(group: list[Any]) -> list[Trace]:
    """Return empty traces of the first and the last batch of a pass, or of its only batch."""
    if len(group) == 1:
        return [Trace(copy_batch(group[0]))]
    samples = sum(map(len, group)) or 1
    first, last = len(group[0]), len(group[-1])
    return [
        Trace(copy_batch(group[0]), (0, first, samples)),
        Trace(copy_batch(group[-1]), (samples - last, samples, samples)),
    ]


def compare_with_single_passes(
    context: CalibrationContext,
    traces: Sequence[list[Trace]],
    eps: float,
    seed: Callable[[int, int], None],
) -> float:
    """Return the largest difference between traced batches and single passes.

    Args:
        context: inputs of the calibration.
        traces: traces of each traced pass.
        eps: machine epsilon of the coarsest dtype in the forward.
        seed: function that seeds random numbers for a pass and its number of layers so far.

    Raises:
        InterferenceError: a difference exceeds its bound, or the layers differ.
    """
    largest = 0.0
    # A causal forward cannot show interference in the first batch, nor a reversed one in the last.
    for number, trace in ((0, traces[0][0]), (len(traces) - 1, traces[-1][-1])):
        single = Trace(trace.batch)

        def record(layer: BNLayer, x: Tensor, single: Trace = single, number: int = number) -> None:
            single.add(layer, x)
            seed(number, len(single.entries))

        seed(number, 0)
        with hook_inputs(context.layers, record):
            context.run(trace.batch)
        largest = max(largest, _largest_difference(trace, single, eps))
    return largest


def _largest_difference(traced: Trace, single: Trace, eps: float) -> float:
    """Return the largest difference between a batch in lockstep and in a single pass.

    The unit of a mean is a standard deviation, ``unit^2 = running_var + sample_var + (sample_mean -
    running_mean)^2``, with the new statistics. The unit of a variance is ``unit^2``. A mean of
    coalesced batches may also differ by 32 of its roundings.

    Coalesced batches run other kernels, and deep networks amplify their rounding. So their bound is
    half of the digits. Measured on CPU, in units of the bound: at most 0.08 for residual networks
    of 110 layers and plain ones of 40; 1.3 for 30 linear layers without shortcuts, whose batches
    are then not coalesced. The bound of repeated passes is a few roundings.
    """
    largest = 0.0
    bound, rounding = min(_MAX_REPEATED_ROUNDINGS * eps, _MAX_REPEATED_DIFFERENCE), 0.0
    if traced.part is not None:
        bound, rounding = eps**0.5, _ROUNDINGS * eps
    for (layer, ours), (other, theirs) in zip(traced.entries, single.entries, strict=False):
        if layer is not other:
            raise InterferenceError(f"{layer.name}: a single pass reaches {other.name} instead")
        difference = _difference(layer, ours, theirs, rounding)
        if not difference <= bound:
            raise InterferenceError(
                f"{layer.name}: the input differs from a single pass by {difference:.2g} "
                "standard deviations; the forward keeps state between layers, or samples depend on "
                "each other"
            )
        largest = max(largest, difference)
    calls = len(traced.entries), len(single.entries)
    if calls[0] != calls[1]:
        raise InterferenceError(
            f"the forward reaches {calls[0]} layers; a single pass reaches {calls[1]}"
        )
    return largest


def _difference(layer: BNLayer, ours: SampleStats, theirs: SampleStats, rounding: float) -> float:
    if ours.mean.shape != theirs.mean.shape:
        return math.inf
    if not ours.mean.numel():
        return 0.0
    our_mean, mean = ours.exact_mean(), theirs.exact_mean()
    square = layer.running_var.double() + theirs.var
    square = square + (mean - layer.running_mean.double()).square()
    noise = rounding * mean.abs()
    shift = _excess(our_mean, mean, noise, square.sqrt())
    change = _excess(ours.var.double(), theirs.var.double(), noise.square(), square)
    return float(torch.maximum(shift, change).max())


def _excess(ours: Tensor, theirs: Tensor, noise: Tensor, unit: Tensor) -> Tensor:
    """Return differences beyond noise; infinite if only one of two values is NaN."""
    difference = (ours - theirs).abs()
    # A constant channel has no unit.
    equal = (difference <= noise) | (ours == theirs) | (ours.isnan() & theirs.isnan())
    return ((difference - noise) / unit).nan_to_num(math.inf, math.inf).masked_fill(equal, 0.0)
