"""The ranks of a calibration: they agree on every step, and fail together."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.calibration.interrupts import Held
from syncbn.distributed.collectives import all_reduce
from syncbn.distributed.objects import all_gather_objects

_FAILED = -1
T = TypeVar("T")


class Ranks:
    """The ranks that calibrate together.

    Args:
        group: to talk to; None for this process alone.
        device: of the messages.
        interrupts: held back while ranks talk: a rank that left a message out would be waited for.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        interrupts: Held | None = None,
    ) -> None:
        self._group = group
        self._device = device
        self._interrupts = interrupts or Held()

    @property
    def rank(self) -> int:
        """The rank of this process, from 0."""
        return 0 if self._group is None else self._group.rank()

    @property
    def size(self) -> int:
        """The number of ranks."""
        return 1 if self._group is None else self._group.size()

    def together(self, work: Callable[[], list[int]], numbers: int) -> Tensor:
        """Do this rank's work and learn what the others' has come to; every rank must call this.

        Args:
            work: raises, or returns what the others must know: integers from 0.
            numbers: that it returns.

        Returns:
            int64 ``[W, numbers]``, by rank.

        Raises:
            RuntimeError: the work of another rank has failed.
            BaseException: what this rank's work has raised.
        """
        try:
            with self._interrupts.let_through():
                mine = work()
            assert len(mine) == numbers
            assert all(number >= 0 for number in mine)
        except BaseException:
            self._gather([_FAILED] * numbers)
            raise
        everyone = self._gather(mine)
        failed = (everyone == _FAILED).all(1).nonzero().flatten().tolist()
        if failed:
            names = ", ".join(f"rank {rank}" for rank in failed)
            raise RuntimeError(f"calibration was ended by an error on {names}; see there")
        return everyone

    def agreed(self, work: Callable[[], T]) -> T:
        """Do this rank's work, which has succeeded on every rank when this returns.

        Every rank must call this.

        Raises:
            RuntimeError: the work of another rank has failed.
            BaseException: what this rank's work has raised.
        """
        results: list[T] = []

        def do() -> list[int]:
            results.append(work())
            return [0]

        self.together(do, numbers=1)
        return results[0]

    def objects(self, value: T) -> list[T]:
        """Return the values of all ranks, anything that pickles; every rank must call this."""
        return [value] if self._group is None else all_gather_objects(value, self._group)

    def sharing_memory(self) -> int:
        """Return how many of the ranks share this one's memory; every rank must call this."""
        where = socket.gethostname()
        if self._device.type == "cuda":
            where += str(torch.cuda.get_device_properties(self._device).uuid)
        name = hashlib.blake2b(where.encode(), digest_size=7).digest()
        mine = torch.tensor([int.from_bytes(name, "big")], device=self._device)
        return int((self.gather(mine) == mine).sum())

    def sum(self, vector: Tensor, label: str) -> Tensor:
        """Return a float64 vector summed over the ranks, with the same bits on all of them."""
        return all_reduce(vector, self._group, label)

    def first(self, vector: Tensor) -> Tensor:
        """Return the vector of the first rank, in place; every rank must call this."""
        if self._group is not None:
            dist.broadcast(vector, dist.get_global_rank(self._group, 0), group=self._group)
        return vector

    def gather(self, vector: Tensor) -> Tensor:
        """Return the vectors of all ranks, ``[W, n]``."""
        rows = vector.new_empty(self.size, vector.numel())
        if self._group is None:
            rows[0] = vector
        else:
            dist.all_gather(list(rows), vector.contiguous(), group=self._group)
        return rows

    def _gather(self, numbers: list[int]) -> Tensor:
        return self.gather(torch.tensor(numbers, device=self._device)).cpu()
