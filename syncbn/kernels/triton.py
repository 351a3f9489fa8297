"""The kernels on CUDA, in Triton: how programs share a tensor, and what they are told.

Three launches forward, three backward: sums of splits, their sum, and the elementwise pass, which
does the arithmetic on C numbers by the way. Where a channel needs no splitting, there are two.
Nothing waits for the device, and memory is that of the current stream.

With ``TRITON_INTERPRET=1`` in the environment before this is imported, kernels run in Triton's
interpreter, which takes tensors of the CPU: slowly, and with the same arithmetic.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from triton import next_power_of_2
from triton.runtime.interpreter import InterpretedFunction

from syncbn.kernels import reference, triton_kernels
from syncbn.kernels.samples import Samples, alike, empty_like, readable
from syncbn.kernels.transform import Forward, Running, Transform, Wanted
from syncbn.kernels.triton_tiles import AT_A_TIME, COMPUTE, OF_A_WARP, Tiles, cdiv, tiles_of

IS_INTERPRETED = isinstance(triton_kernels.combine, InterpretedFunction)
# Numbers that a program adds up at a time, and at most how many of those of a channel.
_COMBINED, _TOGETHER = 2048, 512
# Of the interpreter, which has one.
_MULTIPROCESSORS = 132
# Of GPUs that Triton compiles for.
_LEAST_CAPABILITY = (8, 0)


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
    tiles = _tiles(x, samples)
    found = x.new_empty(2 * samples.channels + 1, dtype=torch.float64)
    count = samples.batch * samples.space
    parts = _parts(found, tiles)
    numbers = (*tiles.size, samples.stride, tiles.number, tiles.splits, count)
    _run(
        triton_kernels.moments,
        tiles.blocks * tiles.splits,
        *(x, parts, *numbers),
        **tiles.reduction([x], samples.stride),
    )
    if parts is not found:
        _combine(parts, found, tiles, count=count)
    return found


def normalize(
    x: Tensor, message: Tensor, how: Forward, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`syncbn.kernels.reference.normalize`."""
    x, samples = readable(x)
    tiles = _tiles(x, samples)
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
    _run(
        triton_kernels.normalize,
        tiles.programs,
        *(
            x,
            added,
            y,
            how.gate,
            message,
            statistics,
            _dense_numbers(how.weight),
            _dense_numbers(how.bias),
        ),
        *(*running[:3], how.eps, running.momentum or 0.0),
        *(*tiles.size, samples.stride, samples.dense_stride, tiles.number),
        RELU=how.relu,
        CUMULATIVE=cumulative,
        **tiles.elementwise(samples.stride, samples.dense_stride),
    )
    # As a call of torch would: autograd must notice if it still needs what was there.
    increment_version([t for t in running[:3] if t is not None])
    return y, statistics


def new_gate(x: Tensor) -> Tensor:
    """See :meth:`syncbn.kernels.gated.Gated.new_gate`."""
    x, samples = readable(x)
    return torch.empty(_tiles(x, samples).gate, dtype=torch.uint8, device=x.device)


def opened(gate: Tensor, x: Tensor) -> Tensor:
    """See :meth:`syncbn.kernels.gated.Gated.opened`."""
    x, samples = readable(x)
    tiles = _tiles(x, samples)
    found = empty_like(x, samples, torch.bool)
    _run(
        triton_kernels.unpack,
        tiles.programs,
        *(gate, found.view(torch.int8), *tiles.size, samples.dense_stride, tiles.number),
        **tiles.elementwise(samples.dense_stride),
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
    tiles = _tiles(x, samples)
    over = may_overwrite and dy_stride == samples.dense_stride
    gated = dy if gate is None or over else empty_like(x, samples)
    sums = x.new_empty(2 * samples.channels, dtype=torch.float64)
    dweight, dbias = (None if t is None else torch.empty_like(t).contiguous() for t in wanted)
    parts = _parts(sums, tiles)
    gradients = (dbias, dweight) if parts is sums else (None, None)
    _run(
        triton_kernels.backward_reduce,
        tiles.blocks * tiles.splits,
        *(dy, gate, gated, x, parts, *_numbers(transform), *gradients, *tiles.size),
        *(dy_stride, samples.stride, samples.dense_stride, tiles.number, tiles.splits),
        RELU=transform.relu,
        **tiles.reduction([dy, x], dy_stride, samples.stride, samples.dense_stride),
    )
    if parts is not sums:
        _combine(parts, sums, tiles, dbias, dweight)
    return gated, sums, dweight, dbias


def backward_elemt(
    dy: Tensor, x: Tensor, transform: Transform, sums: Tensor, may_overwrite: bool = False
) -> Tensor:
    """See :func:`syncbn.kernels.reference.backward_elemt`."""
    x, samples = readable(x)
    dy, dy_stride = alike(dy, x, samples)
    tiles = _tiles(x, samples)
    over = may_overwrite and dy_stride == samples.dense_stride
    dx = dy if over else empty_like(x, samples)
    _run(
        triton_kernels.backward_elemt,
        tiles.programs,
        *(dy, x, dx, sums, *_numbers(transform)),
        *(*tiles.size, dy_stride, samples.stride, samples.dense_stride),
        RELU=transform.relu,
        **tiles.elementwise(dy_stride, samples.stride, samples.dense_stride),
    )
    return dx


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _slots(device: torch.device) -> int:
    """Return how many programs run at a time."""
    if device.type == "cpu":
        return AT_A_TIME * _MULTIPROCESSORS
    properties = torch.cuda.get_device_properties(device)
    return AT_A_TIME * int(properties.multi_processor_count)


def _tiles(x: Tensor, samples: Samples) -> Tiles:
    return tiles_of(samples, x.dtype, _slots(x.device))


def _parts(sums: Tensor, tiles: Tiles) -> Tensor:
    """Return where programs write: to the result if they are alone with their channels."""
    if tiles.splits == 1:
        return sums
    return sums.new_empty(tiles.splits, 2 * tiles.size[1])


def _combine(
    parts: Tensor,
    sums: Tensor,
    tiles: Tiles,
    dbias: Tensor | None = None,
    dweight: Tensor | None = None,
    count: int | None = None,
) -> None:
    channels = tiles.size[1]
    block_k = min(next_power_of_2(tiles.splits), _TOGETHER)
    block_c = min(next_power_of_2(channels), _COMBINED // block_k)
    _run(
        triton_kernels.combine,
        cdiv(channels, block_c),
        *(parts, sums, dbias, dweight, channels, tiles.splits, count),
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        num_warps=_COMBINED // OF_A_WARP,
        enable_fp_fusion=True,
    )


def _run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device.
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants)
    else:
        kernel[(programs,)](*arguments, **constants)


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
