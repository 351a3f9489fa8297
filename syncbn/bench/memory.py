"""Memory: how much tensors take, and whether malloc gives it back between calls."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import accumulate
from operator import itemgetter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1
# Of the profiler's library, which otherwise reports its own beginning and end.
_SILENT = "99"
# What it calls an allocation or a release.
_CHANGE = "[memory]"


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
    # A recorder of torch's calls would change what is measured: C++ kernels step aside for it.
    os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        events.export_chrome_trace(str(path))
        trace = json.loads(path.read_bytes())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in trace if event["name"] == _CHANGE]
    changes.sort(key=itemgetter(0))
    return max(accumulate((int(change) for _, change in changes), initial=0))
