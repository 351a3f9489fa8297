"""The random generators that loaders and models draw from."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def same_randomness(loader: object = None) -> Iterator[None]:
    """Put random generators back after the body as they were before.

    Args:
        loader: whose generators, as of a DataLoader, are put back with those of torch, Python and
            numpy.
    """
    states = [(generator, generator.get_state()) for generator in _generators(loader)]
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
            for generator, state in states:
                generator.set_state(state)


def _generators(loader: object) -> list[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if isinstance(generator, torch.Generator)]
