"""The random generators that loaders and models draw from."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def same_randomness() -> Iterator[None]:
    """Put the generators of torch, Python and numpy back after the body as they were before."""
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpys = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            if numpys is not None:
                numpy.random.set_state(numpys)
