"""Who else sees, or replaces, the calls of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

#: Returns how many of `TorchDispatchMode` there are: tracers, recorders, fake tensors. They see
#: calls of torch, and only these, may replace them, and keep what they are given.
is_watched = torch._C._len_torch_dispatch_stack
#: Returns whether a transform of `torch.func` runs, which sees through functions of its own.
is_transformed = torch._C._are_functorch_transforms_active


def is_forward_differentiated() -> bool:
    """Return whether forward-mode derivatives may be taken."""
    return forward_ad._current_level >= 0


@contextmanager
def hidden(x: Tensor) -> Iterator[None]:
    """Keep the body's calls from modes, unless x is of theirs.

    Selective checkpointing counts calls, and a recomputation has fewer.
    """
    if is_watched() and type(x) in (Tensor, Parameter):
        with _disable_current_modes():
            yield
    else:
        yield
