"""Where a process stands in its job."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist


class Place(NamedTuple):
    """What a launcher says about one process.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: processes in the job.
        local_rank: number of this process on its machine.
        local_world_size: processes of the job on this machine.
        store: key-value store shared by the ranks of the job.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store: dist.Store
