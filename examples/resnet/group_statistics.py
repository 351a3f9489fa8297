"""Running statistics of all data, from layers that synchronize within groups of ranks.

The running statistics of a group cover its data only. Training does not read them; evaluations and
checkpoints need statistics of all data.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import syncbn


def has_groups(net: nn.Module) -> bool:
    """Return whether a network has layers that synchronize over a part of the ranks."""
    return any(
        isinstance(layer, syncbn.SyncBatchNorm) and layer.process_group is not None
        for layer in net.modules()
    )


@contextmanager
def merged_statistics(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Give every rank the running statistics of all ranks' data in the body; a collective.

    Afterwards each rank has its own again. Without that, the variances of the next steps would
    count the spread between groups in part, and a run would depend on the times of its checkpoints.

    Args:
        net: network whose ranks have batches of equal size; unchanged if it has no groups.

    Yields:
        Copies of this rank's own buffers by name; empty if the network has no groups.
    """
    own = {name: b.clone() for name, b in net.named_buffers()} if has_groups(net) else {}
    if own:
        syncbn.merge_over_ranks(net, count=1)
    try:
        yield own
    finally:
        load_buffers(net, own)


@torch.no_grad()
def load_buffers(net: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values into the buffers of these names."""
    for name, value in values.items():
        net.get_buffer(name).copy_(value)
