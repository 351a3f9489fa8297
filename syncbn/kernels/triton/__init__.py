"""The Triton kernel for CUDA tensors: two launches forward, two backward.

A reduction ends in the last program of a channel, which combines the partial sums of all; the
elementwise pass computes the per-channel coefficients on the fly. Nothing synchronizes with the
device, and memory comes from torch's allocator on the current stream.

With ``TRITON_INTERPRET=1`` in the environment before this import, the kernels run in Triton's
interpreter on CPU tensors: slowly, and with the same arithmetic.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from triton.runtime.interpreter import InterpretedFunction

from syncbn.kernels.activations import Activation
from syncbn.kernels.base import (
    Kernel,
    NormalizeArgs,
    OutputMask,
    Reduced,
    RunningStats,
    Saved,
)
from syncbn.kernels.layout import NCSLayout, as_dense, empty_dense, match_layout, with_key
from syncbn.kernels.reference import update_running_stats
from syncbn.kernels.triton import kernels
from syncbn.kernels.triton.launcher import plan_launch
from syncbn.kernels.triton.tiling import COMPUTE, relu_mask_bytes
from syncbn.moments import Moments

IS_INTERPRETED = isinstance(kernels.moments, InterpretedFunction)
# Values per channel: the size of a row of the packed ReLU mask is rounded up in int32.
_VALUES_LIMIT = 2**31 - 16
# The least compute capability that Triton compiles for.
_LEAST_CAPABILITY = (8, 0)


class TritonKernel(Kernel):
    """Launches of :mod:`syncbn.kernels.triton.kernels`."""

    def unsupported_reason(self, x: Tensor) -> str | None:
        """See :meth:`Kernel.unsupported_reason`."""
        if x.numel() >= _VALUES_LIMIT and x.numel() >= _VALUES_LIMIT * x.shape[1]:
            return "does not support 2^31 values per channel"
        return _unsupported_reason(x.device, x.dtype)

    def moments(self, x: Tensor) -> Tensor:
        """See :meth:`Kernel.moments`."""
        x, layout = as_dense(x)
        moments = x.new_empty(2 * layout.channels + 1, dtype=torch.float64)
        _launch("moments", layout, x, {"moments_ptr": moments})
        return moments

    def normalize(
        self, x: Tensor, moments: Tensor, args: NormalizeArgs, residual: Tensor | None = None
    ) -> tuple[Tensor, Saved]:
        """See :meth:`Kernel.normalize`."""
        source, layout = as_dense(x)
        mean, var, counter, momentum = running = _updatable(args.running, moments, x)
        if cumulative := momentum is None and counter is not None:
            # Apart: all programs read the counter that one of them would update.
            counter.add_(moments[-1] > 1)
        added = None if residual is None else _without_gaps(residual, source, layout)
        statistics = x.new_empty(2 * layout.channels + 1, dtype=torch.float64)
        y, mask = empty_dense(source, layout), None
        if residual is not None and args.activation is not None:
            size = relu_mask_bytes(layout, x.dtype)
            mask = torch.empty(size, dtype=torch.uint8, device=x.device)
        tensors = {"moments_ptr": moments, "residual_ptr": added, "y_ptr": y, "relu_mask_ptr": mask}
        tensors |= _affine_pointers(statistics, args.weight, args.bias)
        tensors |= {"running_mean_ptr": mean, "running_var_ptr": var, "num_batches_ptr": counter}
        scalars = {"eps": args.eps, "momentum": momentum or 0.0}
        _launch("normalize", layout, source, tensors, None, args.activation, cumulative, **scalars)
        # As an operation of torch would: autograd must notice if it still needs the old values.
        increment_version([t for t in running[:3] if t is not None])
        key = None if mask is None else layout.key
        return y, Saved(x, args.weight, args.bias, statistics, mask, args.activation, key)

    def backward_reduce(self, dy: Tensor, saved: Saved, output_mask: OutputMask) -> Reduced:
        """See :meth:`Kernel.backward_reduce`; the pass also writes dy after a stored ReLU mask."""
        x, layout = with_key(saved.x, saved.layout)
        mask, masked_dy = saved.activation_values, None
        dy, stride = match_layout(dy, x, layout)
        if mask is not None and (output_mask[0] or output_mask[3]):
            masked_dy = empty_dense(x, layout)
        sums = x.new_empty(2 * layout.channels, dtype=torch.float64)
        tensors = _affine_pointers(saved.statistics, saved.weight, saved.bias)
        weight, bias = tensors["weight_ptr"], tensors["bias_ptr"]
        dweight = torch.empty_like(weight) if output_mask[1] and weight is not None else None
        dbias = torch.empty_like(bias) if output_mask[2] and bias is not None else None
        tensors |= {"dy_ptr": dy, "relu_mask_ptr": mask, "masked_dy_ptr": masked_dy}
        tensors |= {"sums_ptr": sums, "dweight_ptr": dweight, "dbias_ptr": dbias}
        _launch("backward_reduce", layout, x, tensors, stride, saved.activation)
        dy = dy if masked_dy is None else masked_dy
        dresidual = dy if output_mask[3] else None
        inplace_ok = masked_dy is not None and dresidual is None
        return Reduced(sums, dweight, dbias, dresidual, dy, inplace_ok)

    def backward_elemt(self, saved: Saved, reduced: Reduced, sums: Tensor) -> Tensor:
        """See :meth:`Kernel.backward_elemt`."""
        x, layout = with_key(saved.x, saved.layout)
        dy, stride = match_layout(reduced.dy, x, layout)
        dx = dy if reduced.inplace_ok else empty_dense(x, layout)
        tensors = _affine_pointers(saved.statistics, saved.weight, saved.bias)
        tensors |= {"dy_ptr": dy, "dx_ptr": dx, "sums_ptr": sums}
        activation = saved.activation if saved.activation_values is None else None
        _launch("backward_elemt", layout, x, tensors, stride, activation)
        return dx

    def unit_derivative(self, saved: Saved) -> Tensor:
        """See :meth:`Kernel.unit_derivative`."""
        if saved.activation_values is None:
            return super().unit_derivative(saved)
        ones = torch.ones_like(saved.x)
        masked = self.backward_reduce(ones, saved, (False, False, False, True)).dresidual
        assert masked is not None
        return masked == 1


@cache
def _unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != ("cpu" if IS_INTERPRETED else "cuda"):
        return f"does not support {device.type!r} tensors"
    if dtype not in COMPUTE:
        return f"does not support {dtype}"
    if torch.version.hip is not None:
        return "does not support AMD GPUs"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return f"does not support GPUs with a compute capability below {_LEAST_CAPABILITY}"
    return None


def _updatable(running: RunningStats | None, moments: Tensor, x: Tensor) -> RunningStats:
    """Return the running statistics if the kernel can update them; otherwise update them here."""
    if running is None:
        return RunningStats()
    mean, var, counter, _ = running
    is_readable = all(t is None or (t.is_contiguous() and not t.is_neg()) for t in (mean, var))
    if counter is not None:
        is_readable &= counter.dtype is torch.int64 and counter.device == x.device
    if is_readable:
        return running
    update_running_stats(Moments.unpack(moments, x.shape[1]), running)
    return RunningStats()


def _affine_pointers(
    statistics: Tensor, weight: Tensor | None, bias: Tensor | None
) -> dict[str, Tensor | None]:
    """Return per-channel arguments; weight and bias as the kernels read them."""
    weight, bias = (None if t is None else t.resolve_neg().contiguous() for t in (weight, bias))
    return {"statistics_ptr": statistics, "weight_ptr": weight, "bias_ptr": bias}


def _launch(
    name: str,
    layout: NCSLayout,
    x: Tensor,
    tensors: dict[str, Tensor | None],
    dy_stride: int | None = None,
    activation: Activation | None = None,
    cumulative: bool = False,
    **scalars: float,
) -> None:
    """Launch a kernel; arguments as for :func:`.plan_launch`."""
    dtypes = (x.dtype, *[None if t is None else t.dtype for t in tensors.values()])
    plan = plan_launch(name, layout, x.device, dtypes, dy_stride, activation, cumulative)
    plan(x_ptr=x, **tensors, **plan.new_workspace(), **scalars)


def _without_gaps(t: Tensor, x: Tensor, layout: NCSLayout) -> Tensor:
    """Return t with x's layout, without gaps between samples."""
    t, stride = match_layout(t, x, layout)
    return t if stride == layout.dense_stride else empty_dense(x, layout).copy_(t)
