"""The kernels on CUDA, in Triton: how programs share a tensor, and what they are told.

Two launches forward, two backward: sums, which the last program of a channel adds up, and the
elementwise pass, which does the arithmetic on C numbers by the way. Nothing waits for the device,
and memory is that of the current stream.

With ``TRITON_INTERPRET=1`` in the environment before this is imported, kernels run in Triton's
interpreter, which takes tensors of the CPU: slowly, and with the same arithmetic.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from triton.language.extra import cuda
from triton.runtime.interpreter import InterpretedFunction

from syncbn.kernels import reference, triton_kernels
from syncbn.kernels.samples import Samples, alike, empty_like, readable
from syncbn.kernels.transform import Forward, Running, Transform, Wanted
from syncbn.kernels.triton_tiles import (
    COMPUTE,
    Tiles,
    elementwise,
    for_elements,
    for_sums,
    gate_bytes,
    most_shared,
    reduction,
)

IS_INTERPRETED = isinstance(triton_kernels.moments, InterpretedFunction)
# Of the interpreter, which has one.
_MULTIPROCESSORS = 132
# Of GPUs that Triton compiles for, and of those that prepare a launch during the one before.
_LEAST_CAPABILITY, _OVERLAPPING = (8, 0), (9, 0)


def why_not(x: Tensor) -> str | None:
    """Return what of x these kernels do not serve; None if they serve it."""
    if x.device.type != ("cpu" if IS_INTERPRETED else "cuda"):
        return f"does not serve {x.device.type!r} tensors"
    if x.dtype not in COMPUTE:
        return f"does not serve {x.dtype}"
    if x.numel() >= 2**31 and x.numel() >= 2**31 * x.shape[1]:
        return "does not serve 2^31 values a channel"
    if x.device.type == "cuda" and _capability(x.device.index) < _LEAST_CAPABILITY:
        return f"does not serve GPUs of a capability below {_LEAST_CAPABILITY}"
    return None


def moments(x: Tensor) -> Tensor:
    """See :func:`syncbn.kernels.reference.moments`."""
    x, samples = readable(x)
    tiles = _for_sums(x, samples)
    found = x.new_empty(2 * samples.channels + 1, dtype=torch.float64)
    count = samples.batch * samples.space
    _run(
        triton_kernels.moments,
        tiles.blocks * tiles.splits,
        *(x, *_shared(found, tiles), found),
        *(*tiles.size, samples.stride, tiles.number, tiles.along, tiles.splits, count),
        **reduction(tiles, x.itemsize, samples.stride),
    )
    return found


def normalize(
    x: Tensor, message: Tensor, how: Forward, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`syncbn.kernels.reference.normalize`."""
    x, samples = readable(x)
    tiles = for_elements(samples, x.dtype)
    running = how.running or Running(None, None, None, 0.0)
    if not _can_move(running, x):
        reference.move_running(message, running)
        running = Running(None, None, None, 0.0)
    cumulative = running.momentum is None and running.tracked is not None
    if running.tracked is not None and cumulative:
        # By itself: all programs read what one of them would write.
        running.tracked.add_(message[-1] > 1)
    added = None if residual is None else _dense(residual, x, samples)
    statistics, y = torch.empty_like(message), empty_like(x, samples)
    numbers = message, statistics, _dense_numbers(how.weight), _dense_numbers(how.bias)
    _run(
        triton_kernels.normalize,
        tiles.programs,
        *(x, added, y, how.gate, *numbers),
        *(*running[:3], how.eps, running.momentum or 0.0),
        *(*tiles.size, samples.stride, samples.dense_stride, tiles.number, tiles.along),
        RELU=how.relu,
        CUMULATIVE=cumulative,
        **elementwise(tiles, samples.stride, samples.dense_stride),
    )
    # As a call of torch would: autograd must notice if it still needs what was there.
    increment_version([t for t in running[:3] if t is not None])
    return y, statistics


def new_gate(x: Tensor) -> Tensor:
    """See :meth:`syncbn.kernels.gated.Gated.new_gate`."""
    x, samples = readable(x)
    return torch.empty(gate_bytes(samples, x.dtype), dtype=torch.uint8, device=x.device)


def opened(gate: Tensor, x: Tensor) -> Tensor:
    """See :meth:`syncbn.kernels.gated.Gated.opened`."""
    x, samples = readable(x)
    tiles = for_elements(samples, x.dtype)
    found = empty_like(x, samples, torch.bool)
    _run(
        triton_kernels.unpack,
        tiles.programs,
        *(gate, found.view(torch.int8)),
        *(*tiles.size, samples.dense_stride, tiles.number, tiles.along),
        **elementwise(tiles, samples.dense_stride),
    )
    return found


def backward_reduce(
    dy: Tensor, x: Tensor, transform: Transform, wanted: Wanted = (None, None)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`syncbn.kernels.reference.backward_reduce`."""
    return _reduce(dy, None, x, transform, wanted)[1:]


def backward_reduce_gated(
    dy: Tensor,
    gate: Tensor,
    x: Tensor,
    transform: Transform,
    wanted: Wanted = (None, None),
    may_overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :meth:`syncbn.kernels.gated.Gated.backward_reduce_gated`."""
    return _reduce(dy, gate, x, transform, wanted, may_overwrite)


def _reduce(
    dy: Tensor,
    gate: Tensor | None,
    x: Tensor,
    transform: Transform,
    wanted: Wanted,
    may_overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return what comes through the gate, or dy, and :func:`backward_reduce` of it."""
    x, samples = readable(x)
    dy, dy_stride = alike(dy, x, samples)
    tiles = _for_sums(x, samples)
    over = may_overwrite and dy_stride == samples.dense_stride
    gated = dy if gate is None or over else empty_like(x, samples)
    sums = x.new_empty(2 * samples.channels, dtype=torch.float64)
    dweight, dbias = (None if t is None else torch.empty_like(t).contiguous() for t in wanted)
    strides = dy_stride, samples.stride, samples.dense_stride
    _run(
        triton_kernels.backward_reduce,
        tiles.blocks * tiles.splits,
        *(dy, gate, gated, x, *_shared(sums, tiles), sums, dbias, dweight, *_numbers(transform)),
        *(*tiles.size, *strides, tiles.number, tiles.along, tiles.splits),
        RELU=transform.relu,
        **reduction(tiles, 2 * x.itemsize, *strides),
    )
    return gated, sums, dweight, dbias


def backward_elemt(
    dy: Tensor, x: Tensor, transform: Transform, sums: Tensor, may_overwrite: bool = False
) -> Tensor:
    """See :func:`syncbn.kernels.reference.backward_elemt`."""
    x, samples = readable(x)
    dy, dy_stride = alike(dy, x, samples)
    tiles = for_elements(samples, x.dtype)
    over = may_overwrite and dy_stride == samples.dense_stride
    dx = dy if over else empty_like(x, samples)
    strides = dy_stride, samples.stride, samples.dense_stride
    _run(
        triton_kernels.backward_elemt,
        tiles.programs,
        *(dy, x, dx, sums, *_numbers(transform)),
        *(*tiles.size, *strides, tiles.number, tiles.along),
        RELU=transform.relu,
        **elementwise(tiles, *strides),
    )
    return dx


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _for_sums(x: Tensor, samples: Samples) -> Tiles:
    return for_sums(samples, x.dtype, _multiprocessors(x.device))


def _shared(sums: Tensor, tiles: Tiles) -> tuple[Tensor | None, Tensor | None]:
    """Return what programs that share channels leave to the last, and how many have come: zeros."""
    if tiles.splits == 1:
        return None, None
    return sums.new_empty(tiles.parts), _arrivals(sums.device)


def _arrivals(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return _zeros(device, 0)
    if torch.cuda.is_current_stream_capturing():
        # A graph may be replayed beside whatever else runs then, and has its own.
        return _zeros.__wrapped__(device, 0)
    return _zeros(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _zeros(device: torch.device, stream: int) -> Tensor:
    """Return zeros for launches on a stream, which leave them so, one after the other."""
    return torch.zeros(most_shared(_multiprocessors(device)), dtype=torch.int32, device=device)


def _run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    device = arguments[0].device
    constants |= _overlap(device)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device.
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants)
    else:
        kernel[(programs,)](*arguments, **constants)


@cache
def _overlap(device: torch.device) -> dict[str, bool]:
    """Return how launches begin: while the one before ends, where GPU and Triton can."""
    can = device.type == "cuda" and _capability(device.index) >= _OVERLAPPING
    if can and hasattr(cuda, "gdc_wait"):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def _numbers(t: Transform) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return t.statistics, _dense_numbers(t.weight), _dense_numbers(t.bias)


def _dense_numbers(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.resolve_neg().contiguous()


def _dense(t: Tensor, x: Tensor, samples: Samples) -> Tensor:
    """Return t as x is seen, without gaps."""
    t, stride = alike(t, x, samples)
    return t if stride == samples.dense_stride else empty_like(x, samples).copy_(t)


def _can_move(running: Running, x: Tensor) -> bool:
    """Return whether the kernel can move these averages."""
    mean, var, tracked, _ = running
    plain = all(
        t is None or (t.device == x.device and t.is_contiguous() and not t.is_neg())
        for t in (mean, var, tracked)
    )
    return plain and (tracked is None or tracked.dtype is torch.int64)
