"""Local compute: kernels know nothing of ranks, and one `match` chooses among the modules.

Adding a kernel is a new file with the functions of :class:`Kernel`, a row in :func:`choose`, and a
row in ``tests/kernel_cases.py``, which runs the whole test-suite on it. What each function returns
is written in :mod:`syncbn.kernels.reference`.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from syncbn.kernels import aten_cuda, cpu, reference, traced
from syncbn.kernels.coefficients import Forward as Forward
from syncbn.kernels.coefficients import Running as Running
from syncbn.kernels.coefficients import Transform as Transform
from syncbn.kernels.coefficients import Wanted as Wanted
from syncbn.modes import num_dispatch_modes

_PLAIN = {Tensor, Parameter, type(None)}
NAMES = ("auto", "reference", "cpu", "triton", "aten_cuda")


class Kernel(Protocol):
    """The local computations of batch normalization."""

    def moments(self, x: Tensor) -> Tensor:
        """Return packed :class:`syncbn.moments.Moments`: float64 ``[2C + 1]``.

        Two-part sums for float64 inputs: ``[4C + 1]``.
        """

    def normalize(
        self, x: Tensor, message: Tensor, how: Forward, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return y in x's dtype and layout, and what a :class:`Transform` has of the message.

        Running averages are moved, too, in place.
        """

    def backward_reduce(
        self, dy: Tensor, x: Tensor, transform: Transform, wanted: Wanted = (None, None)
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return ``[sum(dy) (C) | sum(dy * xhat) (C)]``, float64 ``[2C]``; dweight and dbias."""

    def backward_elemt(
        self,
        dy: Tensor,
        x: Tensor,
        transform: Transform,
        sums: Tensor,
        may_overwrite: bool = False,
    ) -> Tensor:
        """Return dx in x's dtype and layout; in dy's memory, if it may be overwritten."""


class TritonKernels(Kernel, Protocol):
    """Kernels that serve some tensors."""

    def why_not(self, x: Tensor) -> str | None:
        """Return why they cannot serve x; None if they can."""


def choose(name: str, x: Tensor, *others: Tensor | None) -> Kernel:
    """Return the kernels for x.

    Args:
        name: "auto" for the fastest that serves x, or the name of one module. A module asked for by
            name is never replaced by another.
        x: the input, shape ``[N, C, *]``.
        others: weight, bias, running averages, a residual; on x's device.

    Raises:
        ValueError: the name is unknown, or the named kernel cannot serve x.
        RuntimeError: the C++ kernels or those in Triton were asked for, and are not there or cannot
            be used; the message says why.
    """
    match name, x.device.type:
        case "auto", _ if torch.compiler.is_compiling():
            return traced
        case "auto", "cpu":
            found = cpu.load()
            return found if _is_plain(x, others) and not isinstance(found, str) else reference
        case "auto", "cuda":
            if missing_triton() or not _is_plain(x, others) or _triton().why_not(x):
                return aten_cuda
            return _triton()
        case (("auto" | "reference"), _):
            return reference
        case (("cpu" | "triton"), _) if torch.compiler.is_compiling() or num_dispatch_modes():
            raise RuntimeError(
                f"kernel {name!r}: got a call under torch.compile or a TorchDispatchMode (tracing, "
                "fake tensors, a recorder), which cannot see what it does; 'auto' takes another one"
            )
        case "cpu", "cpu":
            if isinstance(found := cpu.load(), str):
                raise RuntimeError(f"kernel 'cpu': {found}; 'auto' takes another one")
            return found
        case "triton", _:
            if reason := missing_triton():
                raise RuntimeError(f"kernel 'triton': {reason}; 'auto' takes another one")
            if reason := _triton().why_not(x):
                raise ValueError(f"kernel 'triton' {reason}; use 'auto'")
            return _triton()
        case "aten_cuda", "cuda":
            return aten_cuda
        case (("cpu" | "aten_cuda"), device):
            raise ValueError(f"kernel {name!r} does not serve {device!r} tensors; use 'auto'")
    raise ValueError(f"unknown kernel {name!r}; expected one of {', '.join(NAMES)}")


@cache
def missing_triton() -> str | None:
    """Return what the kernels in Triton lack here; None if they can be compiled."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'syncbn[cuda]'"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: install gcc or clang, or set CC"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Triton needs the headers of Python: install python3-dev, or what has them here"
    return None


def _is_plain(x: Tensor, others: tuple[Tensor | None, ...]) -> bool:
    # Of subclasses of tensors, and where calls of torch are recorded or replaced, calls of torch
    # are what is sure to work.
    return type(x) in _PLAIN and _PLAIN.issuperset(map(type, others)) and not num_dispatch_modes()


@cache
def _triton() -> TritonKernels:
    # Importing triton takes a third of a second, and most who import syncbn's CPU side have none.
    from syncbn.kernels import triton

    return triton
