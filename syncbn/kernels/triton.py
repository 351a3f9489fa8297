"""The kernels on CUDA, in Triton: what they are told, and what is launched.

Two launches forward, two backward: sums, which the last program of a channel adds up, and the
elementwise pass, which does the arithmetic on C numbers by the way. Nothing waits for the device,
and memory is that of the current stream.

With ``TRITON_INTERPRET=1`` in the environment before this is imported, kernels run in Triton's
interpreter, which takes tensors of the CPU: slowly, and with the same arithmetic.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.kernels import reference, triton_kernels
from syncbn.kernels.samples import Samples, alike, empty_like, readable
from syncbn.kernels.transform import Forward, Running, Transform, Wanted
from syncbn.kernels.triton_launch import Launch, capability, is_interpreted, scratch
from syncbn.kernels.triton_tiles import (
    COMPUTE,
    elementwise,
    for_elements,
    for_sums,
    gate_bytes,
    reduction,
)

IS_INTERPRETED = is_interpreted(triton_kernels.moments)
# For the interpreter: as many as GPUs have.
_MULTIPROCESSORS = 132
# Of GPUs that Triton compiles for.
_LEAST_CAPABILITY = (8, 0)
Shared = tuple[int, int] | None
_NOTHING = Running(None, None, None, 0.0)


def why_not(x: Tensor) -> str | None:
    """Return what of x these kernels do not serve; None if they serve it."""
    if x.numel() >= 2**31 and x.numel() >= 2**31 * x.shape[1]:
        return "does not serve 2^31 values a channel"
    return _why_none(x.device, x.dtype)


@cache
def _why_none(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != ("cpu" if IS_INTERPRETED else "cuda"):
        return f"does not serve {device.type!r} tensors"
    if dtype not in COMPUTE:
        return f"does not serve {dtype}"
    if torch.version.hip is not None:
        return "does not serve GPUs of AMD"
    if device.type == "cuda" and capability(device) < _LEAST_CAPABILITY:
        return f"does not serve GPUs of a capability below {_LEAST_CAPABILITY}"
    return None


def moments(x: Tensor) -> Tensor:
    """See :func:`syncbn.kernels.reference.moments`."""
    return _moments(*readable(x))


def normalize(
    x: Tensor, message: Tensor, how: Forward, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`syncbn.kernels.reference.normalize`."""
    return _normalize(*readable(x), message, how, residual)


def forward_alone(x: Tensor, how: Forward, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`syncbn.kernels.alone.forward`."""
    x, samples = readable(x)
    return _normalize(x, samples, _moments(x, samples), how, residual)


def new_gate(x: Tensor) -> Tensor:
    """See :meth:`syncbn.kernels.gated.Gated.new_gate`."""
    x, samples = readable(x)
    return torch.empty(gate_bytes(samples, x.dtype), dtype=torch.uint8, device=x.device)


def opened(gate: Tensor, x: Tensor) -> Tensor:
    """See :meth:`syncbn.kernels.gated.Gated.opened`."""
    x, samples = readable(x)
    found = empty_like(x, samples, torch.bool)
    _unpack_launch(samples, x.dtype, x.device)(gate, found.view(torch.int8))
    return found


def backward_reduce(
    dy: Tensor, x: Tensor, transform: Transform, wanted: Wanted = (None, None)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`syncbn.kernels.reference.backward_reduce`."""
    x, samples = readable(x)
    return _reduce(*alike(dy, x, samples), None, x, samples, transform, wanted)[1:]


def backward_reduce_gated(
    dy: Tensor,
    gate: Tensor,
    x: Tensor,
    transform: Transform,
    wanted: Wanted = (None, None),
    may_overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :meth:`syncbn.kernels.gated.Gated.backward_reduce_gated`."""
    x, samples = readable(x)
    return _reduce(*alike(dy, x, samples), gate, x, samples, transform, wanted, may_overwrite)


def backward_elemt(
    dy: Tensor, x: Tensor, transform: Transform, sums: Tensor, may_overwrite: bool = False
) -> Tensor:
    """See :func:`syncbn.kernels.reference.backward_elemt`."""
    x, samples = readable(x)
    return _elemt(*alike(dy, x, samples), x, samples, transform, sums, may_overwrite)


def backward_alone(
    dy: Tensor, x: Tensor, transform: Transform, wanted: Wanted, may_overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :func:`syncbn.kernels.alone.backward`."""
    x, samples = readable(x)
    dy, stride = alike(dy, x, samples)
    _, sums, dweight, dbias = _reduce(dy, stride, None, x, samples, transform, wanted)
    dx = _elemt(dy, stride, x, samples, transform, sums, may_overwrite)
    return sums, dx, dweight, dbias


def _moments(x: Tensor, samples: Samples) -> Tensor:
    launch, shared = _moments_launch(samples, x.dtype, x.device)
    found = x.new_empty(2 * samples.channels + 1, dtype=torch.float64)
    launch(x, *_scratch(x.device, shared), found)
    return found


def _normalize(
    x: Tensor, samples: Samples, message: Tensor, how: Forward, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    running = how.running or _NOTHING
    if running is not _NOTHING and not _can_move(running, x.device):
        reference.move_running(message, running)
        running = _NOTHING
    mean, var, tracked, momentum = running
    cumulative = momentum is None and tracked is not None
    if tracked is not None and cumulative:
        # By itself: all programs read what one of them would write.
        tracked.add_(message[-1] > 1)
    added = None if residual is None else _dense(residual, x, samples)
    statistics, y = torch.empty_like(message), empty_like(x, samples)
    _normalize_launch(samples, x.dtype, x.device, how.relu, cumulative)(
        *(x, added, y, how.gate, message, statistics),
        *(_dense_numbers(how.weight), _dense_numbers(how.bias), mean, var, tracked),
        floats=(how.eps, momentum or 0.0),
    )
    if running is not _NOTHING:
        # As a call of torch would: autograd must notice if it still needs what was there.
        increment_version([t for t in running[:3] if t is not None])
    return y, statistics


def _reduce(
    dy: Tensor,
    dy_stride: int,
    gate: Tensor | None,
    x: Tensor,
    samples: Samples,
    transform: Transform,
    wanted: Wanted,
    may_overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return what comes through the gate, or dy, and :func:`backward_reduce` of it."""
    over = may_overwrite and dy_stride == samples.dense_stride
    gated = dy if gate is None or over else empty_like(x, samples)
    sums = x.new_empty(2 * samples.channels, dtype=torch.float64)
    dweight, dbias = (None if t is None else _new_gradient(t) for t in wanted)
    launch, shared = _reduce_launch(samples, dy_stride, x.dtype, x.device, transform.relu)
    launch(
        *(dy, gate, gated, x, *_scratch(x.device, shared), sums, dbias, dweight),
        *(transform.statistics, _dense_numbers(transform.weight), _dense_numbers(transform.bias)),
    )
    return gated, sums, dweight, dbias


def _elemt(
    dy: Tensor,
    dy_stride: int,
    x: Tensor,
    samples: Samples,
    transform: Transform,
    sums: Tensor,
    may_overwrite: bool,
) -> Tensor:
    over = may_overwrite and dy_stride == samples.dense_stride
    dx = dy if over else empty_like(x, samples)
    _elemt_launch(samples, dy_stride, x.dtype, x.device, transform.relu)(
        *(dy, x, dx, sums, transform.statistics),
        *(_dense_numbers(transform.weight), _dense_numbers(transform.bias)),
    )
    return dx


# Layers see the same few shapes again and again. The sums' launches come with how much programs
# tell each other.
_kept = lru_cache(maxsize=4096)


@_kept
def _moments_launch(
    samples: Samples, dtype: torch.dtype, device: torch.device
) -> tuple[Launch, Shared]:
    tiles = for_sums(samples, dtype, _multiprocessors(device))
    strides = (samples.stride,)
    sizes = *tiles.size, *strides, tiles.number, tiles.along, tiles.splits
    constants = reduction(tiles, dtype.itemsize, *strides)
    programs, count = tiles.blocks * tiles.splits, samples.batch * samples.space
    kernel = triton_kernels.moments
    return Launch(kernel, device, programs, (*sizes, count), constants), tiles.shared


@_kept
def _normalize_launch(
    samples: Samples, dtype: torch.dtype, device: torch.device, relu: bool, cumulative: bool
) -> Launch:
    tiles = for_elements(samples, dtype)
    strides = samples.stride, samples.dense_stride
    sizes = *tiles.size, *strides, tiles.number, tiles.along
    constants = elementwise(tiles, *strides) | {"RELU": relu, "CUMULATIVE": cumulative}
    return Launch(triton_kernels.normalize, device, tiles.programs, sizes, constants)


@_kept
def _reduce_launch(
    samples: Samples, dy_stride: int, dtype: torch.dtype, device: torch.device, relu: bool
) -> tuple[Launch, Shared]:
    tiles = for_sums(samples, dtype, _multiprocessors(device))
    strides = dy_stride, samples.stride, samples.dense_stride
    sizes = *tiles.size, *strides, tiles.number, tiles.along, tiles.splits
    constants = reduction(tiles, 2 * dtype.itemsize, *strides) | {"RELU": relu}
    programs = tiles.blocks * tiles.splits
    return Launch(triton_kernels.backward_reduce, device, programs, sizes, constants), tiles.shared


@_kept
def _elemt_launch(
    samples: Samples, dy_stride: int, dtype: torch.dtype, device: torch.device, relu: bool
) -> Launch:
    tiles = for_elements(samples, dtype)
    strides = dy_stride, samples.stride, samples.dense_stride
    sizes = *tiles.size, *strides, tiles.number, tiles.along
    constants = elementwise(tiles, *strides) | {"RELU": relu}
    return Launch(triton_kernels.backward_elemt, device, tiles.programs, sizes, constants)


@_kept
def _unpack_launch(samples: Samples, dtype: torch.dtype, device: torch.device) -> Launch:
    tiles = for_elements(samples, dtype)
    sizes = *tiles.size, samples.dense_stride, tiles.number, tiles.along
    constants = elementwise(tiles, samples.dense_stride)
    return Launch(triton_kernels.unpack, device, tiles.programs, sizes, constants)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _scratch(device: torch.device, shared: Shared) -> tuple[Tensor | None, Tensor | None]:
    """Return what programs that share channels leave to the last, and how many have come: zeros."""
    return (None, None) if shared is None else scratch(device, *shared)


def _new_gradient(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _dense_numbers(t: Tensor | None) -> Tensor | None:
    if t is None or (t.is_contiguous() and not t.is_neg()):
        return t
    return t.resolve_neg().contiguous()


def _dense(t: Tensor, x: Tensor, samples: Samples) -> Tensor:
    """Return t as x is seen, without gaps."""
    t, stride = alike(t, x, samples)
    return t if stride == samples.dense_stride else empty_like(x, samples).copy_(t)


def _can_move(running: Running, device: torch.device) -> bool:
    """Return whether the kernel can move these averages; mean and var are on the device."""
    mean, var, tracked, _ = running
    for t in (mean, var):
        if t is not None and (t.is_neg() or not t.is_contiguous()):
            return False
    return tracked is None or (tracked.dtype is torch.int64 and tracked.device == device)
