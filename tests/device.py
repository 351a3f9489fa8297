"""Device and kernel of the layer tests: the CPU, or the kernel of ``pytest --impl``.

``--impl triton`` runs on a GPU, shared by all ranks, if available. Otherwise the kernel is
interpreted; the reference serves the inputs that it does not support, as ATen does on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from syncbn import kernels
from syncbn.kernels import Kernel
from tests import interpreter

# Errors that would synchronize a GPU, and memory that NumPy shares. Evaluated when a test runs.
on_cpu = pytest.mark.skipif("torch.get_default_device().type == 'cuda'", reason="CPU only")
_selected = ["auto"]


def get_impl() -> str:
    """Return the name of the kernel that layers use."""
    return _selected[0]


def use_impl(impl: str) -> None:
    """Select a kernel for layers with ``impl="auto"``; call this before any tensor is made."""
    _selected[0] = impl
    if impl == "triton" and torch.cuda.is_available():
        torch.set_default_device("cuda")
        # The 10-bit mantissa of TF32 convolutions is too coarse for a reference.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        return
    if impl == "auto":
        return
    if impl == "triton":
        interpreter.begin()
    select_fastest = kernels._select_fastest
    kernel = kernels.select_kernel(impl, torch.empty(1, 1))

    def select(x: Tensor, tensors: tuple[Tensor | None, ...]) -> Kernel:
        # Compilers and tensor subclasses get the reference.
        is_default = isinstance(select_fastest(x, tensors), type(kernels.REFERENCE))
        is_supported = kernel.unsupported_reason(x) is None
        return kernel if is_supported and not is_default else kernels.REFERENCE

    kernels._select_fastest = select


def seeded(seed: int) -> torch.Generator:
    """Return a random number generator on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
