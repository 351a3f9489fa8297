"""The kernels on CUDA, in Triton: what they are told, and what is launched.

Two launches forward, two backward: sums, which the last program of a channel adds up, and the
elementwise pass, which does the arithmetic on C numbers by the way. A third may write what comes
through the ReLU after a residual, during a message. Nothing waits for the device, and memory is
that of the current stream.

With ``TRITON_INTERPRET=1`` in the environment before this is imported, kernels run in Triton's
interpreter, which takes tensors of the CPU: slowly, and with the same arithmetic.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from triton.runtime.interpreter import InterpretedFunction

from syncbn.kernels import reference
from syncbn.kernels.coefficients import Forward, Running, Transform, Wanted
from syncbn.kernels.layout import Samples, alike, empty_like, readable
from syncbn.kernels.triton import device as triton_kernels
from syncbn.kernels.triton import plans as passes
from syncbn.kernels.triton.launcher import capability
from syncbn.kernels.triton.tiling import COMPUTE, gate_bytes
from syncbn.moments import Moments

IS_INTERPRETED = isinstance(triton_kernels.moments, InterpretedFunction)
# Of GPUs that Triton compiles for.
_LEAST_CAPABILITY = (8, 0)
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
    x, samples = readable(x)
    found = x.new_empty(2 * samples.channels + 1, dtype=torch.float64)
    passes.moments(samples, x.device, x.dtype)((x, found))
    return found


def normalize(
    x: Tensor, message: Tensor, how: Forward, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`syncbn.kernels.reference.normalize`."""
    return forward_alone(x, how, residual, message)


def forward_alone(
    x: Tensor, how: Forward, residual: Tensor | None, message: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`syncbn.kernels.alone.forward`; or of a message that is there."""
    x, samples = readable(x)
    mean, var, tracked, momentum = running = how.running or _NOTHING
    if running is not _NOTHING and not _can_move(running, x.device):
        message = moments(x) if message is None else message
        reference.move_running(Moments.unpack(message, samples.channels), running)
        mean, var, tracked, momentum = running = _NOTHING
    if cumulative := momentum is None and tracked is not None:
        # By itself: all programs read what one of them would write.
        count = samples.batch * samples.space if message is None else message[-1]
        tracked.add_(count > 1)
    weight, bias = _numbers(how.weight, how.bias)
    added = None if residual is None else _dense(residual, x, samples)
    statistics = x.new_empty(2 * samples.channels + 1, dtype=torch.float64)
    y, gate = empty_like(x, samples), how.gate
    tensors = x, message, added, y, gate, statistics, weight, bias, mean, var, tracked
    launch = passes.forward(samples, x.device, _kinds(tensors), how.relu, cumulative)
    launch(tensors, (how.eps, momentum or 0.0))
    if running is not _NOTHING:
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
    found = empty_like(x, samples, torch.bool)
    bytes_ = found.view(torch.int8)
    passes.through_gate(samples, x.device, x.dtype, None)((None, gate, bytes_))
    return found


def through_gate(dy: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """See :meth:`syncbn.kernels.gated.Gated.through_gate`."""
    x, samples = readable(x)
    dy, stride = alike(dy, x, samples)
    gated = empty_like(x, samples)
    passes.through_gate(samples, x.device, x.dtype, stride)((dy, gate, gated))
    return gated


def backward_reduce(
    dy: Tensor, x: Tensor, transform: Transform, wanted: Wanted = (None, None)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`syncbn.kernels.reference.backward_reduce`."""
    return backward_reduce_gated(dy, None, x, transform, wanted, write=False)[1:]


def backward_reduce_gated(
    dy: Tensor,
    gate: Tensor | None,
    x: Tensor,
    transform: Transform,
    wanted: Wanted = (None, None),
    may_overwrite: bool = False,
    write: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :meth:`syncbn.kernels.gated.Gated.backward_reduce_gated`; or dy is plain."""
    x, samples = readable(x)
    dy, stride = alike(dy, x, samples)
    gated = None
    if write:
        over = may_overwrite and stride == samples.dense_stride
        gated = dy if over else empty_like(x, samples)
    sums = x.new_empty(2 * samples.channels, dtype=torch.float64)
    given = x, sums, dy, gate, gated, None
    found = _backward(samples, stride, transform, wanted, given)
    return dy if gated is None else gated, sums, *found


def backward_elemt(
    dy: Tensor, x: Tensor, transform: Transform, sums: Tensor, may_overwrite: bool = False
) -> Tensor:
    """See :func:`syncbn.kernels.reference.backward_elemt`."""
    x, samples = readable(x)
    dy, stride = alike(dy, x, samples)
    dx = dy if may_overwrite and stride == samples.dense_stride else empty_like(x, samples)
    given = x, sums, dy, None, None, dx
    _backward(samples, stride, transform, (None, None), given)
    return dx


def backward_alone(
    dy: Tensor,
    x: Tensor,
    transform: Transform,
    wanted: Wanted,
    may_overwrite: bool = False,
    keep_sums: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """See :func:`syncbn.kernels.alone.backward`."""
    if keep_sums:
        sums, dweight, dbias = backward_reduce(dy, x, transform, wanted)
        return sums, backward_elemt(dy, x, transform, sums, may_overwrite), dweight, dbias
    return backward_alone_gated(dy, None, x, transform, wanted, may_overwrite)


def backward_alone_gated(
    dy: Tensor,
    gate: Tensor | None,
    x: Tensor,
    transform: Transform,
    wanted: Wanted,
    may_overwrite: bool = False,
    keep_gated: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """See :meth:`syncbn.kernels.gated.Gated.backward_alone_gated`; or dy is plain."""
    x, samples = readable(x)
    dy, stride = alike(dy, x, samples)
    over = may_overwrite and stride == samples.dense_stride
    ours = dy if over else empty_like(x, samples)
    gated, dx = None if gate is None else ours, empty_like(x, samples) if keep_gated else ours
    given = x, None, dy, gate, gated, dx
    return gated if keep_gated else None, dx, *_backward(samples, stride, transform, wanted, given)


def _backward(
    samples: Samples,
    dy_stride: int,
    transform: Transform,
    wanted: Wanted,
    given: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Launch what :func:`passes.backward` says of these tensors, and return dweight and dbias.

    Args:
        samples: what kernels see in x.
        dy_stride: of the samples of dy.
        transform: of the forward pass.
        wanted: weight and bias; None for each whose gradient is not.
        given: the first tensors of :data:`passes.BACKWARD`.
    """
    x, *_ = given
    assert x is not None
    weight, bias = _numbers(transform.weight, transform.bias)
    of_weight, of_bias = wanted
    dweight = None if of_weight is None else torch.empty_like(of_weight)
    dbias = None if of_bias is None else torch.empty_like(of_bias)
    tensors = *given, transform.statistics, weight, bias, dweight, dbias
    launch = passes.backward(samples, x.device, _kinds(tensors), dy_stride, transform.relu)
    launch(tensors)
    return dweight, dbias


def _kinds(tensors: tuple[Tensor | None, ...]) -> passes.Kinds:
    return tuple([None if t is None else t.dtype for t in tensors])


def _numbers(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias as kernels read them: one number after the other."""
    for t in (weight, bias):
        if t is not None and (t.is_neg() or not t.is_contiguous()):
            return _dense_numbers(weight), _dense_numbers(bias)
    return weight, bias


def _dense_numbers(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.resolve_neg().contiguous()


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
