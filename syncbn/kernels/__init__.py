"""Kernels, and the choice among them.

A kernel is a class with the methods of :class:`syncbn.kernels.base.Kernel`. To add one, write its
file, a case in :func:`select_kernel` with a name in :data:`Impl`, and rows in
``tests/kernel_cases.py`` and ``tests/kernels/conftest.py``, whose tests then run on it.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from syncbn.kernels import cpu
from syncbn.kernels.aten_cuda import AtenCudaKernel
from syncbn.kernels.base import Kernel as Kernel
from syncbn.kernels.reference import ReferenceKernel
from syncbn.modes import num_dispatch_modes

#: Names of the kernels; "auto" selects the fastest one for a tensor.
Impl: TypeAlias = Literal["auto", "reference", "cpu", "triton", "aten_cuda"]
IMPLS: tuple[Impl, ...] = get_args(Impl)

REFERENCE, _ATEN_CUDA = ReferenceKernel(), AtenCudaKernel()
_PLAIN = {Tensor, Parameter, type(None)}


def select_kernel(impl: str, x: Tensor, *tensors: Tensor | None) -> Kernel:
    """Return the kernel for x.

    Args:
        impl: "auto" for the first of C++, Triton, ATen and reference that supports x, or the name
            of a kernel, which is never replaced by another.
        x: input, shape ``[N, C, *]``.
        tensors: weight, bias, running statistics and residual on x's device, or None.

    Raises:
        ValueError: the name is unknown, or the named kernel does not support x.
        RuntimeError: the named kernel cannot be used on this machine or under a compiler.
    """
    match impl:
        case "reference":
            return REFERENCE
        case "auto":
            # torch.compile can trace the reference kernel.
            return REFERENCE if torch.compiler.is_compiling() else _select_fastest(x, tensors)
        case "cpu" | "triton":
            kernel = _load_kernel(impl)
        case "aten_cuda":
            kernel = _ATEN_CUDA
        case _:
            raise unknown_impl(impl)
    if reason := kernel.unsupported_reason(x):
        raise ValueError(f"kernel {impl!r} {reason}; use 'auto'")
    return kernel


def unknown_impl(impl: object) -> ValueError:
    """Return the error for an unknown name of a kernel."""
    return ValueError(f"unknown impl {impl!r}; expected one of {', '.join(IMPLS)}")


def _select_fastest(x: Tensor, tensors: tuple[Tensor | None, ...]) -> Kernel:
    # Tensor subclasses and dispatch modes would miss a call through ctypes or Triton.
    is_plain = (
        type(x) in _PLAIN and _PLAIN.issuperset(map(type, tensors)) and not num_dispatch_modes()
    )
    match x.device.type:
        case "cpu" if is_plain and not isinstance(kernel := cpu.load(), str):
            return kernel
        case "cuda":
            if is_plain and triton_unavailable_reason() is None:
                triton = _load_triton()
                if triton.unsupported_reason(x) is None:
                    return triton
            return _ATEN_CUDA
        case _:
            return REFERENCE


def _load_kernel(impl: str) -> Kernel:
    """Return the kernel "cpu" or "triton"."""
    if torch.compiler.is_compiling() or num_dispatch_modes():
        raise RuntimeError(
            f"kernel {impl!r}: got a call under torch.compile or a TorchDispatchMode (tracing, "
            "fake tensors, a recorder), which cannot follow it; 'auto' selects another kernel"
        )
    if impl == "cpu":
        kernel: Kernel | str = cpu.load()
    else:
        kernel = triton_unavailable_reason() or _load_triton()
    if isinstance(kernel, str):
        raise RuntimeError(f"kernel {impl!r}: {kernel}; 'auto' selects another kernel")
    return kernel


@cache
def triton_unavailable_reason() -> str | None:
    """Return the reason why Triton cannot compile kernels here; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'syncbn[cuda]'"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: install gcc or clang, or set CC"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Triton needs the headers of Python: install python3-dev or its equivalent"
    return None


@cache
def _load_triton() -> Kernel:
    # Importing triton takes a third of a second, which users of the CPU kernel need not pay.
    from syncbn.kernels.triton import TritonKernel

    return TritonKernel()
