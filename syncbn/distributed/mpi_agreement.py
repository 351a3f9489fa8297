"""What a collective expects the other ranks to do, too, for TORCH_DISTRIBUTED_DEBUG=DETAIL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

# The others' tensors may differ in size from rank to rank, or only one rank has results.
_OF_ONE_SIZE = (
    "all_reduce", "broadcast", "reduce", "all_gather_single", "reduce_scatter_single"
)  # fmt: skip


def is_wanted() -> bool:
    """Return whether the ranks are to compare collectives before they start them."""
    return dist.get_debug_level() == dist.DebugLevel.DETAIL


def describe(name: str, results: Sequence[Tensor], opts: Any) -> str:
    """Return what must be the same on every rank that takes part in a collective.

    Args:
        name: of the collective.
        results: the tensors that it fills.
        opts: as torch.distributed passed them; may be None.
    """
    words = [name]
    if name in _OF_ONE_SIZE:
        words.append(" and ".join(f"{result.numel()} {result.dtype}" for result in results))
    if hasattr(opts, "reduceOp"):
        words.append(opts.reduceOp.op.name)
    if hasattr(opts, "rootRank"):
        words.append(f"root {opts.rootRank}")
    return ", ".join(words)
