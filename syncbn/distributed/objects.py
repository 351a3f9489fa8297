"""All-gather of Python objects without NumPy, which torch's `all_gather_object` requires."""

from __future__ import annotations

import ctypes
import pickle
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def all_gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the objects of all ranks in rank order; a collective.

    Args:
        value: object of this rank; all ranks must be trusted, since unpickling can run code.
        group: ranks that take part; None for all.
    """
    # Only NCCL lacks CPU tensors.
    device = torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else "cuda")
    pickled = bytearray(pickle.dumps(value))
    size = torch.tensor([len(pickled)], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    lengths = [int(length) for length in sizes]
    # Every rank must send the same number of bytes.
    mine = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    mine[: len(pickled)] = torch.frombuffer(pickled, dtype=torch.uint8)
    rows = [torch.empty_like(mine) for _ in lengths]
    dist.all_gather(rows, mine, group=group)
    objects: list[T] = []
    for row, length in zip(rows, lengths, strict=True):
        received = row.cpu()
        objects.append(pickle.loads(ctypes.string_at(received.data_ptr(), length)))
    return objects
