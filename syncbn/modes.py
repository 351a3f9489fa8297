"""Who else sees the calls of torch."""

from __future__ import annotations

import torch


def is_watched() -> bool:
    """Return whether there is a `TorchDispatchMode`: a tracer, a recorder, fake tensors.

    It sees calls of torch, and only these, may replace them, and keep what they are given.
    """
    return torch._C._len_torch_dispatch_stack() > 0
