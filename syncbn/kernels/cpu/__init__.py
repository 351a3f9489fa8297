"""The C++ kernel for CPU tensors (`csrc/`): one pass over the memory per function.

It is called through ctypes. A torch extension would have to be built for each version of torch,
and a nanobind module for each version of Python; a plain C library serves all of them.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.kernels.activations import NAMES, Activation
from syncbn.kernels.base import (
    Gradients,
    Kernel,
    NormalizeArgs,
    OutputMask,
    Reduced,
    RunningStats,
    Saved,
    parameter_gradients,
    undo_activation,
)
from syncbn.kernels.cpu.library import load_library
from syncbn.kernels.layout import NCSLayout, as_dense, empty_dense, match_layout
from syncbn.kernels.reference import update_running_stats
from syncbn.moments import Moments, get_packed_size

# The instruction sets of syncbn_level().
LEVELS = ("baseline", "AVX2", "AVX-512")
# Values of the enum DType in kernels.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Values of the enum ActivationKind in kernels.h.
_ACTIVATIONS = {name: number for number, name in enumerate((None, *NAMES))}
# Statistics; weight, bias and their dtype; activation.
_Affine: TypeAlias = tuple[
    Tensor | None, Tensor | None, Tensor | None, torch.dtype, Activation | None
]
# Dtype and addresses of the running statistics; address of the counter; momentum.
_Running: TypeAlias = tuple[int, int, int, int, float]
_NO_AFFINE = None, None, None, torch.float32, None
_NO_RUNNING = 0, 0, 0, 0, 0.0
_NO_OPERAND = 0, 0
# `Call` in kernels.h.
_CALL = struct.Struct("=25q3d")


class CPUKernel(Kernel):
    """Calls of the C++ library.

    Args:
        library: the loaded library.
        level: instruction set, a position in :data:`LEVELS`.
    """

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        self.library, self.level = library, level

    def unsupported_reason(self, x: Tensor) -> str | None:
        """See :meth:`Kernel.unsupported_reason`."""
        return None if x.is_cpu else f"does not support {x.device.type!r} tensors"

    def moments(self, x: Tensor) -> Tensor:
        """See :meth:`Kernel.moments`."""
        x, layout = as_dense(x)
        size = get_packed_size(layout.channels, x.dtype)
        moments = x.new_empty(size, dtype=torch.float64)
        self._run(self.library.moments, x, layout, moments.data_ptr())
        return moments

    def normalize(
        self, x: Tensor, moments: Tensor, args: NormalizeArgs, residual: Tensor | None = None
    ) -> tuple[Tensor, Saved]:
        """See :meth:`Kernel.normalize`."""
        return self._forward(x, moments, args, residual)

    def forward_local(
        self, x: Tensor, args: NormalizeArgs, residual: Tensor | None = None
    ) -> tuple[Tensor, Saved]:
        """See :meth:`Kernel.forward_local`: blocks of channels stay in the cache between passes."""
        return self._forward(x, None, args, residual)

    def backward_reduce(self, dy: Tensor, saved: Saved, output_mask: OutputMask) -> Reduced:
        """See :meth:`Kernel.backward_reduce`."""
        dy, inplace_ok = undo_activation(dy, saved)
        sums = saved.x.new_empty(2 * saved.x.shape[1], dtype=torch.float64)
        _, dweight, dbias = self._backward(
            self.library.backward_reduce, dy, saved, sums, output_mask, writes_dx=False
        )
        dresidual = dy if output_mask[3] else None
        return Reduced(sums, dweight, dbias, dresidual, dy, inplace_ok and dresidual is None)

    def backward_elemt(self, saved: Saved, reduced: Reduced, sums: Tensor) -> Tensor:
        """See :meth:`Kernel.backward_elemt`."""
        mask = True, False, False, False
        function = self.library.backward_elemt
        dx, _, _ = self._backward(function, reduced.dy, saved, sums, mask, reduced.inplace_ok)
        assert dx is not None
        return dx

    def backward_local(self, dy: Tensor, saved: Saved, output_mask: OutputMask) -> Gradients:
        """See :meth:`Kernel.backward_local`: blocks of channels stay in the cache."""
        dy, inplace_ok = undo_activation(dy, saved)
        sums = saved.x.new_empty(2 * saved.x.shape[1], dtype=torch.float64)
        dresidual = dy if output_mask[3] else None
        inplace_ok = inplace_ok and dresidual is None
        function = self.library.backward_local
        gradients = self._backward(function, dy, saved, sums, output_mask, inplace_ok)
        return *gradients, dresidual

    def _forward(
        self, x: Tensor, moments: Tensor | None, args: NormalizeArgs, residual: Tensor | None
    ) -> tuple[Tensor, Saved]:
        """Return the output and the saved values; without moments, use the moments of x."""
        running = None if args.running is None else _pack_running(args.running)
        if args.running is not None and running is None:
            moments = self.moments(x) if moments is None else moments
            update_running_stats(Moments.unpack(moments, x.shape[1]), args.running)
        function = self.library.forward_local if moments is None else self.library.normalize
        source, layout = as_dense(x)
        statistics = x.new_empty(2 * layout.channels + 1, dtype=torch.float64)
        weight, bias, dtype = _readable_parameters(args.weight, args.bias)
        affine = statistics, weight, bias, dtype, args.activation
        y = empty_dense(source, layout)
        operand, stride = (None, 0) if residual is None else match_layout(residual, source, layout)
        self._run(
            function,
            source,
            layout,
            _address(moments),
            affine,
            _NO_OPERAND,
            (_address(operand), stride),
            (y.data_ptr(), layout.dense_stride),
            running or _NO_RUNNING,
            args.eps,
        )
        if running is not None and args.running is not None:
            # As an operation of torch would: autograd must notice if it still needs the old values.
            increment_version([t for t in args.running[:3] if t is not None])
        # The next layer keeps the output alive, so it costs no memory.
        values = None if residual is None or args.activation is None else y
        return y, Saved(x, args.weight, args.bias, statistics, values, args.activation)

    def _backward(
        self,
        function: Callable[[bytes], int],
        dy: Tensor,
        saved: Saved,
        sums: Tensor,
        output_mask: OutputMask,
        inplace_ok: bool = False,
        writes_dx: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return dx, dweight and dbias of a library function.

        Args:
            function: function of the library, which reads the sums or computes them.
            dy: gradient of the output, before an activation behind a residual.
            saved: values of the forward pass.
            sums: gradient sums, float64, shape ``[2C]``.
            output_mask: requested gradients.
            inplace_ok: True if dx may be written over dy.
            writes_dx: False for a function that only reduces.
        """
        x, layout = as_dense(saved.x)
        dy, stride = match_layout(dy, x, layout)
        weight, bias, dtype = _readable_parameters(saved.weight, saved.bias)
        activation = saved.activation if saved.activation_values is None else None
        dx = None
        if writes_dx:
            dx = dy if inplace_ok and stride == layout.dense_stride else empty_dense(x, layout)
        # The library writes gradients of the dtype it reads.
        is_read = weight is saved.weight and bias is saved.bias
        dweight = torch.empty_like(weight) if output_mask[1] and weight is not None else None
        dbias = torch.empty_like(bias) if output_mask[2] and bias is not None else None
        self._run(
            function,
            x,
            layout,
            sums.data_ptr(),
            (saved.statistics, weight, bias, dtype, activation),
            (_address(dweight), _address(dbias)) if is_read else _NO_OPERAND,
            (_address(dy), stride),
            (_address(dx), layout.dense_stride),
        )
        if not is_read:
            dweight, dbias = parameter_gradients(sums, saved, output_mask)
        return dx, dweight, dbias

    def _run(
        self,
        function: Callable[[bytes], int],
        x: Tensor,
        layout: NCSLayout,
        sums: int,
        affine: _Affine = _NO_AFFINE,
        gradients: tuple[int, int] = _NO_OPERAND,
        operand: tuple[int, int] = _NO_OPERAND,
        output: tuple[int, int] = _NO_OPERAND,
        running: _Running = _NO_RUNNING,
        eps: float = 0.0,
    ) -> None:
        """Call a function of the library.

        One block of bytes: converting two dozen ctypes arguments takes longer than a small tensor.

        Args:
            function: function of the library.
            x: input.
            layout: layout of x.
            sums: address of moments or gradient sums.
            affine: statistics, parameters and activation, computed or recomputed from x.
            gradients: addresses of dweight and dbias, of the dtype of weight and bias.
            operand: address and stride of a residual or of dy.
            output: address and stride of the output.
            running: result of :func:`_pack_running`.
            eps: constant added to the variance.
        """
        batch, channels, space, stride, _ = layout
        shape = batch, channels, space, batch * channels * space
        head = self.level, torch.get_num_threads(), _DTYPES[x.dtype], *shape
        source = _address(x), stride
        statistics, weight, bias, dtype, activation = affine
        name, slope = activation or (None, 0.0)
        values = _address(statistics), _DTYPES[dtype], _address(weight), _address(bias)
        tensors = *source, *values, _ACTIVATIONS[name], *gradients, sums, *operand, *output
        call = _CALL.pack(*head, *tensors, *running, eps, slope)
        if function(call):
            raise MemoryError("no memory for the sums of the C++ kernels")


def _readable_parameters(
    weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, torch.dtype]:
    """Return weight and bias, or float64 copies, that one call can read; and their dtype."""
    if dtype := _common_dtype(weight, bias):
        return weight, bias, dtype
    weight, bias = (
        None if t is None else t.resolve_neg().double().contiguous() for t in (weight, bias)
    )
    return weight, bias, torch.float64


def _address(t: Tensor | None) -> int:
    """Return the address of a tensor's values; 0 for None."""
    if t is None:
        return 0
    pointer = t.data_ptr()
    if pointer == 0 and t.numel() > 0:
        raise RuntimeError(
            f"got a {type(t).__name__} without memory; the kernel 'cpu' takes plain tensors "
            "(impl='reference' takes any)"
        )
    return pointer


def _common_dtype(a: Tensor | None, b: Tensor | None) -> torch.dtype | None:
    """Return the dtype of two per-channel tensors; None if one call cannot read both."""
    if a is None or b is None:
        a = b = b if a is None else a
        if a is None or b is None:
            return torch.float32
    dtype = a.dtype
    is_plain = dtype is b.dtype and a.is_contiguous() and b.is_contiguous()
    return dtype if is_plain and not a.is_neg() and not b.is_neg() else None


def _pack_running(running: RunningStats) -> _Running | None:
    """Return the running statistics of a call; None if the library cannot update them."""
    mean, var, counter, momentum = running
    dtype = _common_dtype(mean, var)
    if dtype is None or momentum != momentum:
        return None
    if counter is not None and (counter.dtype is not torch.int64 or not counter.is_cpu):
        return None
    # NaN stands for None in the library; a momentum that is NaN was refused above.
    share = math.nan if momentum is None else momentum
    return _DTYPES[dtype], _address(mean), _address(var), _address(counter), share


@cache
def load() -> CPUKernel | str:
    """Return the kernel for the best instruction set of this processor, or why it is missing."""
    library = load_library()
    return library if isinstance(library, str) else CPUKernel(library, library.syncbn_level())


def describe() -> str:
    """Return the name of the instruction set in use, or the reason why the library is missing."""
    kernel = load()
    return kernel if isinstance(kernel, str) else LEVELS[kernel.level]
