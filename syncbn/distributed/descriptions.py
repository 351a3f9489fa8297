"""Comparison of the ranks' descriptions of a group, before the group is created."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from syncbn.distributed.handshake import publish


def compare_descriptions(description: str) -> None:
    """Check that every rank describes the same groups; a collective over the store.

    Ranks that create different groups wait for each other until the timeout, in collectives that
    name no group. The store compares any descriptions, without a backend.

    Args:
        description: description of this rank, as text.

    Raises:
        ValueError: the descriptions differ; raised on every rank, with all descriptions.
        RuntimeError: a rank has not described a group within the timeout of the default group.
    """
    default = dist.group.WORLD
    assert default is not None
    # Dry runs with torch's "fake" backend have a single process.
    if default.size() == 1 or dist.get_backend() == "fake":
        return
    rank, size, store = default.rank(), default.size(), default.get_group_store()
    # The store counts the calls: a count in this process would outlive the default group.
    call = store.add(f"syncbn_groups/calls/{rank}", 1)
    store = dist.PrefixStore(f"syncbn_groups/{call}", store)
    store.add(f"equal/{description}", 1)
    try:
        publish(store, rank, size, inherited_timeout() or default_pg_timeout, description)
    except TimeoutError as error:
        raise RuntimeError(
            f"{error} to describe a group (call {call}):\n"
            f"{_list_descriptions(store, size)}\nEvery rank must pass its model to "
            "convert_sync_batchnorm with the same process_group, in the same order."
        ) from None
    if store.add(f"equal/{description}", 0) != size:
        raise ValueError(
            f"got different groups on different ranks (call {call}):\n"
            f"{_list_descriptions(store, size)}\nexpected the same description on every rank; "
            "pass the same process_group, in the same order, everywhere"
        )


def inherited_timeout() -> timedelta | None:
    """Return the timeout passed to init_process_group; None if the backend does not report it.

    ``new_group(timeout=None)`` has torch's default of 10 or 30 minutes instead.
    """
    default = dist.group.WORLD
    assert default is not None
    backend = default._get_backend(default._device_types[0])
    # The backend "mpi4py" has no options.
    timeout: timedelta | None = getattr(getattr(backend, "options", backend), "_timeout", None)
    return timeout


def _list_descriptions(store: dist.Store, size: int) -> str:
    """Return one line per rank."""
    keys = [f"value/{rank}" for rank in range(size)]
    texts = (store.get(key).decode() if store.check([key]) else "no group yet" for key in keys)
    return "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(texts))
