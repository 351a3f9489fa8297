"""The random generators that loaders and models draw from."""

from __future__ import annotations

import hashlib
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


def generator_states() -> list[Any]:
    """Return the states of the global generators of torch, Python and NumPy; they compare equal."""
    numpy: Any = sys.modules.get("numpy")
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    found: list[Any] = [random.getstate(), *(state.tolist() for state in states)]
    if numpy is not None:
        _, words, *rest = numpy.random.get_state()
        found += [words.tolist(), rest]
    return found


def seed_generators(*numbers: int) -> None:
    """Seed the global generators of torch, Python and NumPy by a hash of some numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    seed = int.from_bytes(digest, "big")
    torch.manual_seed(seed)
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def _generators(loader: object) -> list[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if isinstance(generator, torch.Generator)]
