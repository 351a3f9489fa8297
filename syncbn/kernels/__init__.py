"""Local compute: kernels know nothing of ranks, and one `match` chooses among the modules.

Adding a kernel is a new file with the functions of :class:`Kernel`, a row in :func:`choose`, and a
row in ``tests/kernels.py``, which runs the whole test-suite on it. What each function returns is
written in :mod:`syncbn.kernels.reference`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from syncbn.kernels import aten_cuda, cpu, reference, traced
from syncbn.kernels.transform import Forward as Forward
from syncbn.kernels.transform import Running as Running
from syncbn.kernels.transform import Transform as Transform
from syncbn.kernels.transform import Wanted as Wanted
from syncbn.modes import is_watched

_PLAIN = {Tensor, Parameter, type(None)}
NAMES = ("auto", "reference", "cpu", "aten_cuda")


class Kernel(Protocol):
    """The local computations of batch normalization."""

    def moments(self, x: Tensor) -> Tensor:
        """Return ``[sum (C) | sum_sq (C) | count (1)]``, float64 ``[2C + 1]``."""

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


def choose(name: str, x: Tensor, *others: Tensor | None) -> Kernel:
    """Return the kernels for x.

    Args:
        name: "auto" for the fastest that serves x, or the name of one module. A module asked for by
            name is never replaced by another.
        x: the input, shape ``[N, C, *]``.
        others: weight, bias, running averages, a residual; on x's device.

    Raises:
        ValueError: the name is unknown, or the named kernel cannot serve x's device.
        RuntimeError: the C++ kernels were asked for, and are not there or cannot be used; the
            message says why.
    """
    match name, x.device.type:
        case "auto", _ if torch.compiler.is_compiling():
            return traced
        case "auto", "cpu":
            found = cpu.load()
            # Of subclasses of tensors, and where calls of torch are recorded or replaced, the
            # formulas are what is sure to work.
            plain = type(x) in _PLAIN and _PLAIN.issuperset(map(type, others)) and not is_watched()
            return found if plain and not isinstance(found, str) else reference
        case (("auto" | "aten_cuda"), "cuda"):
            return aten_cuda
        case (("auto" | "reference"), _):
            return reference
        case "cpu", "cpu":
            if torch.compiler.is_compiling() or is_watched():
                raise RuntimeError(
                    "kernel 'cpu': got a call under torch.compile or a TorchDispatchMode (tracing, "
                    "fake tensors, a recorder), which cannot see what C++ does; 'auto' takes "
                    "another one"
                )
            if isinstance(found := cpu.load(), str):
                raise RuntimeError(f"kernel 'cpu': {found}; 'auto' takes another one")
            return found
        case (("cpu" | "aten_cuda"), device):
            raise ValueError(f"kernel {name!r} does not serve {device!r} tensors; use 'auto'")
    raise ValueError(f"unknown kernel {name!r}; expected one of {', '.join(NAMES)}")
