"""Errors and values that all ranks must share.

If one rank raises and the remaining ranks enter a collective, they block until the timeout.
Work that can fail on one rank alone (reading a folder that one node lacks, say) is therefore done
inside `raise_on_all_ranks`: afterwards either every rank continues, or every rank raises the same
message.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Run the block; if it raises on any rank, raise on all of them.

    A collective: every rank must enter. Exceptions unrelated to input (programming
    errors) pass through at once, and the launcher ends the remaining ranks.

    Raises:
        ValueError: the block raised `ValueError`, `RuntimeError` or `OSError` on at least one rank;
            the message carries each distinct message and the first rank that raised it.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, RuntimeError, OSError) as caught:
        error = caught
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error) or repr(error))
    first_rank: dict[str, int] = {}
    for rank, message in enumerate(messages):
        if message is not None:
            first_rank.setdefault(message, rank)
    if first_rank:
        text = "\n".join(f"rank {rank}: {message}" for message, rank in first_rank.items())
        raise ValueError(text) from error


def require_equal_on_ranks(name: str, value: Hashable) -> None:
    """Raise on every rank unless all ranks hold an equal value.

    Args:
        name: name of the value in the message.
        value: anything with `==` that pickles.

    Raises:
        ValueError: two ranks differ; the message lists the value of each rank.
    """
    values: list[Hashable] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        listed = ", ".join(f"rank {rank}: {item}" for rank, item in enumerate(values))
        raise ValueError(
            f"{name} differs between ranks, expected the same everywhere; got {listed}"
        )
