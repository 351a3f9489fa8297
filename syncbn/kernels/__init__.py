"""Local compute: kernels know nothing of ranks, and one `match` chooses among the modules.

Adding a kernel is a new file with the four functions of :class:`Kernel`, a row in :func:`choose`,
and a row in ``tests/kernels.py``, which runs the whole test-suite on it. What each function returns
is written in :mod:`syncbn.kernels.reference`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

# Elements up to which, on CPU, the fewest calls are the fastest kernel (docs/kernels.md).
_SMALL = 1 << 16

NAMES = ("auto", "reference", "blocked", "aten_cpu", "aten_cuda")


class Kernel(Protocol):
    """The four local computations of batch normalization."""

    def moments(self, x: Tensor) -> Tensor:
        """Return ``[sum (C) | sum_sq (C) | count (1)]``, float64 ``[2C + 1]``."""

    def normalize(
        self, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Return ``(x - mean) * invstd * weight + bias`` in x's dtype and layout."""

    def backward_reduce(self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
        """Return ``[sum(dy) (C) | sum(dy * xhat) (C)]``, float64 ``[2C]``."""

    def backward_elemt(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        sums: Tensor,
        count: Tensor,
    ) -> Tensor:
        """Return dx in x's dtype and layout."""


def choose(name: str, x: Tensor) -> Kernel:
    """Return the kernel module for x.

    Args:
        name: "auto" for the fastest that serves x, or the name of one module. A module asked for by
            name is never replaced by another.
        x: the input, shape ``[N, C, *]``.

    Raises:
        ValueError: the name is unknown, or the named kernel cannot serve x's device.
    """
    match name, x.device.type:
        case "auto", "cuda":
            from syncbn.kernels import aten_cuda

            return aten_cuda
        case "auto", "cpu":
            from syncbn.kernels import aten_cpu, reference

            return aten_cpu if x.numel() > _SMALL else reference
        case (("auto" | "reference"), _):
            from syncbn.kernels import reference

            return reference
        case "blocked", "cpu":
            from syncbn.kernels import blocked

            return blocked
        case "aten_cpu", "cpu":
            from syncbn.kernels import aten_cpu

            return aten_cpu
        case "aten_cuda", "cuda":
            from syncbn.kernels import aten_cuda

            return aten_cuda
        case (("blocked" | "aten_cpu" | "aten_cuda"), device):
            raise ValueError(f"kernel {name!r} does not serve {device!r} tensors; use 'auto'")
    raise ValueError(f"unknown kernel {name!r}; expected one of {', '.join(NAMES)}")
