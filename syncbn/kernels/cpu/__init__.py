"""The C++ kernel for CPU tensors (`csrc/`): each function reads its inputs and writes once.

It is called through ctypes. A torch extension would have to be built for each version of torch,
and a nanobind module for each version of Python; a plain C library serves all of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.kernels.base import (
    Gradients,
    Kernel,
    NormalizeArgs,
    OutputMask,
    Reduced,
    Saved,
    apply_relu_mask,
    parameter_gradients,
)
from syncbn.kernels.cpu import abi
from syncbn.kernels.cpu.source_hash import checksum_path, find_sources, hash_sources, is_intact
from syncbn.kernels.layout import as_dense, empty_dense, match_layout
from syncbn.kernels.reference import update_running_stats
from syncbn.moments import Moments, get_packed_size

# Built by hatch_build.py.
PATH = Path(__file__).with_name("libsyncbn_cpu.so")
_REASON = PATH.with_suffix(".txt")
# The instruction sets of syncbn_level().
LEVELS = ("baseline", "AVX2", "AVX-512")

_FUNCTIONS = (
    *("moments", "normalize", "backward_reduce", "backward_elemt"),
    *("forward_local", "backward_local"),
)


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
        dy, inplace_ok = apply_relu_mask(dy, saved)
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
        dy, inplace_ok = apply_relu_mask(dy, saved)
        sums = saved.x.new_empty(2 * saved.x.shape[1], dtype=torch.float64)
        dresidual = dy if output_mask[3] else None
        inplace_ok = inplace_ok and dresidual is None
        function = self.library.backward_local
        gradients = self._backward(function, dy, saved, sums, output_mask, inplace_ok)
        return *gradients, dresidual

    def _forward(
        self, x: Tensor, moments: Tensor | None, args: NormalizeArgs, residual: Tensor | None
    ) -> tuple[Tensor, Saved]:
        """Return the output and the saved values.

        Args:
            x: input, shape ``[N, C, *]``.
            moments: moments of the whole group, packed; None to compute the moments of x.
            args: arguments of the forward pass.
            residual: tensor of x's shape and dtype, or None.
        """
        running = None if args.running is None else abi.pack_running(args.running)
        if args.running is not None and running is None:
            moments = self.moments(x) if moments is None else moments
            update_running_stats(Moments.unpack(moments, x.shape[1]), args.running)
        function = self.library.forward_local if moments is None else self.library.normalize
        source, layout = as_dense(x)
        statistics = x.new_empty(2 * layout.channels + 1, dtype=torch.float64)
        weight, bias, dtype = _readable_parameters(args.weight, args.bias)
        affine = abi.pack_affine(statistics, weight, bias, args.relu, dtype)
        y = empty_dense(source, layout)
        operand, stride = (None, 0) if residual is None else match_layout(residual, source, layout)
        self._run(
            function,
            source,
            layout,
            abi.address(moments),
            affine,
            abi.NO_OPERAND,
            (abi.address(operand), stride),
            (y.data_ptr(), layout.dense_stride),
            running or abi.NO_RUNNING,
            args.eps,
        )
        if running is not None and args.running is not None:
            # As an operation of torch would: autograd must notice if it still needs the old values.
            increment_version([t for t in args.running[:3] if t is not None])
        relu_values = y if args.relu and residual is not None else None
        return y, Saved(x, args.weight, args.bias, statistics, relu_values, args.relu)

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
            dy: gradient of the output, after the mask of a ReLU behind a residual.
            saved: values of the forward pass.
            sums: gradient sums, float64, shape ``[2C]``.
            output_mask: requested gradients.
            inplace_ok: True if dx may be written over dy.
            writes_dx: False for a function that only reduces.
        """
        x, layout = as_dense(saved.x)
        dy, stride = match_layout(dy, x, layout)
        weight, bias, dtype = _readable_parameters(saved.weight, saved.bias)
        relu = saved.relu and saved.relu_values is None
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
            abi.pack_affine(saved.statistics, weight, bias, relu, dtype),
            (abi.address(dweight), abi.address(dbias)) if is_read else abi.NO_OPERAND,
            (abi.address(dy), stride),
            (abi.address(dx), layout.dense_stride),
        )
        if not is_read:
            dweight, dbias = parameter_gradients(sums, saved, output_mask)
        return dx, dweight, dbias

    def _run(self, function: Callable[[bytes], int], x: Tensor, *arguments: Any) -> None:
        if function(abi.pack(self.level, x, *arguments)):
            raise MemoryError("no memory for the sums of the C++ kernels")


def _readable_parameters(
    weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, torch.dtype]:
    """Return weight and bias, or float64 copies, that one call can read; and their dtype."""
    if dtype := abi.common_dtype(weight, bias):
        return weight, bias, dtype
    weight, bias = (
        None if t is None else t.resolve_neg().double().contiguous() for t in (weight, bias)
    )
    return weight, bias, torch.float64


@cache
def load() -> CPUKernel | str:
    """Return the kernel for the best instruction set of this processor, or why it is missing."""
    if not PATH.exists():
        reason = _REASON.read_text().strip() if _REASON.exists() else "it has not been built"
        return f"there is no {PATH}: {reason}; fix this and install syncbn again"
    try:
        # Before it is mapped: a page that is missing from the file ends the process by SIGBUS.
        if not is_intact(PATH):
            return f"{PATH} is damaged: not as in {checksum_path(PATH)}; install syncbn again"
        library = ctypes.CDLL(str(PATH))
        for name in _FUNCTIONS:
            function = getattr(library, f"syncbn_{name}")
            function.argtypes = (ctypes.c_char_p,)
            setattr(library, name, function)
        if find_sources(PATH.parent) and _read_mark(library) != hash_sources(PATH.parent):
            return f"{PATH} was built from other sources than those beside it; install syncbn again"
        return CPUKernel(library, library.syncbn_level())
    except (OSError, AttributeError, ValueError) as error:
        return f"{PATH} cannot be used: {error}; install syncbn again"


def _read_mark(library: ctypes.CDLL) -> str:
    mark = (ctypes.c_char * 256).in_dll(library, "syncbn_mark").value.decode()
    return mark.partition(",")[0]


def describe() -> str:
    """Return the name of the instruction set in use, or the reason why the library is missing."""
    kernel = load()
    return kernel if isinstance(kernel, str) else LEVELS[kernel.level]
