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


#: Returns whether a tensor is batched by `torch.autograd.grad(is_grads_batched=True)`: by an older
#: vmap than `torch.func.vmap`, without rules for other code.
is_grads_batched = torch._C._functorch.is_legacy_batchedtensor


def unwrap_batched(t: Tensor) -> tuple[Tensor, int]:
    """Return all rows of a tensor for which :func:`is_grads_batched`, and the level of its vmap."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return torch._remove_batch_dim(t, level, 0, 0), level


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
