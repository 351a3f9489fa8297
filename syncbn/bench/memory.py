"""Peak memory of a call, and reuse of freed memory by malloc."""

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

# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1
# Log level at which the profiler's library does not print its own start and stop.
_SILENT = "99"
# Name of an allocation or a release in the profiler's trace.
_MEMORY_EVENT = "[memory]"


def reuse_freed_memory() -> bool:
    """Make malloc keep freed memory; return whether it can.

    Otherwise glibc returns large tensors to the system, and the next ones cost a page fault for
    every 4 KiB: several times the cost of batch norm. The same in a shell is
    ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=...`` (docs/performance.md).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER)
    )


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of tensors allocated by a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # Not a dispatch mode: the C++ kernels are not used under one.
    os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        events.export_chrome_trace(str(path))
        trace = json.loads(path.read_bytes())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in trace if e["name"] == _MEMORY_EVENT]
    changes.sort(key=itemgetter(0))
    return max(accumulate((int(change) for _, change in changes), initial=0))
