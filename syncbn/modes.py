"""Active dispatch modes, functorch transforms and forward-mode differentiation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

#: Returns the number of active `TorchDispatchMode` objects (tracers, recorders, fake tensors). A
#: mode intercepts calls of torch alone, may replace them, and may keep references to arguments.
num_dispatch_modes = torch._C._len_torch_dispatch_stack
#: Returns whether a transform of `torch.func` is active; it differentiates through the body of an
#: `autograd.Function`.
in_functorch_transform = torch._C._are_functorch_transforms_active


def in_forward_ad() -> bool:
    """Return whether a forward-mode differentiation level is active."""
    return forward_ad._current_level >= 0


@contextmanager
def bypass_modes(x: Tensor) -> Iterator[None]:
    """Hide the body's calls from dispatch modes, unless x is a tensor of a mode.

    Selective checkpointing counts calls, and a recomputation makes fewer calls.
    """
    if num_dispatch_modes() and type(x) in (Tensor, Parameter):
        with _disable_current_modes():
            yield
    else:
        yield
