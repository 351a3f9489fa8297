"""Where tests of layers run: on the CPU, or with the kernels in Triton (``make test-triton``).

These run on a GPU, which all ranks share, if there is one. Else they are interpreted, in the place
of the C++ kernels; the reference serves the inputs that Triton does not, as ATen does on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from syncbn import kernels
from syncbn.kernels import cpu
from tests import interpreter

ON_TRITON = "SYNCBN_TEST_TRITON" in os.environ
ON_GPU = ON_TRITON and torch.cuda.is_available()
# Errors that would make a GPU wait, and memory that others can see.
on_cpu = pytest.mark.skipif(ON_GPU, reason="of the CPU alone")


def begin() -> None:
    """Have tensors made, and layers computed, there; to be called before there are any."""
    if ON_GPU:
        torch.set_default_device("cuda")
        # Convolutions of 10 bits are no reference.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    elif ON_TRITON:
        interpreter.begin()
        from syncbn.kernels import triton

        cpu.load = lambda: triton  # type: ignore
        is_plain = kernels._is_plain
        kernels._is_plain = lambda x, others: is_plain(x, others) and not triton.why_not(x)


def seeded(seed: int) -> torch.Generator:
    """Return a generator of random numbers there."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
