"""Memory: how much tensors take, and whether malloc gives it back between calls."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch

from syncbn.calibration.budget import LiveBytes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make malloc keep what is freed; return whether it can.

    Otherwise glibc returns large tensors to the system, and their successors cost a page fault for
    every 4 KiB: several times what batch norm itself costs. In a shell the same is
    ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=...`` (docs/kernels.md).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER)
    )


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most memory that tensors had at once, without what there was before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    watch = _Peak()
    with watch:
        run()
    return watch.peak


class _Peak(LiveBytes):
    """The most memory that tensors had at once; what a library works in is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, self.live_bytes())
        return result
