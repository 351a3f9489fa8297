"""The ranks of a calibration: they agree on every step, and fail together."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
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

    def together(
        self, work: Callable[[], list[int]], numbers: int, step: str = "a pass over the data"
    ) -> Tensor:
        """Do this rank's work and learn what the others' has come to; every rank must call this.

        Args:
            work: raises, or returns what the others must know: integers from 0.
            numbers: that it returns.
            step: part of the calibration, for error messages.

        Returns:
            int64 ``[W, numbers]``, by rank.

        Raises:
            RuntimeError: the work of another rank has failed, or a rank cannot be reached.
            BaseException: what this rank's work has raised.
        """
        try:
            with self._interrupts.let_through():
                mine = work()
            assert len(mine) == numbers
            assert all(number >= 0 for number in mine)
        except BaseException:
            # An unreachable rank must not hide the error of this one.
            with suppress(RuntimeError):
                self._gather([_FAILED] * numbers, step)
            raise
        everyone = self._gather(mine, step)
        failed = (everyone == _FAILED).all(1).nonzero().flatten().tolist()
        if failed:
            names = ", ".join(f"rank {rank}" for rank in failed)
            raise RuntimeError(f"calibration was ended by an error on {names}; see there")
        return everyone

    def agreed(self, work: Callable[[], T], step: str = "the preparation") -> T:
        """Do this rank's work, which has succeeded on every rank when this returns.

        Every rank must call this.

        Args:
            work: function to run.
            step: part of the calibration, for error messages.

        Raises:
            RuntimeError: the work of another rank has failed, or a rank cannot be reached.
            BaseException: what this rank's work has raised.
        """
        results: list[T] = []

        def do() -> list[int]:
            results.append(work())
            return [0]

        self.together(do, numbers=1, step=step)
        return results[0]

    def require_same(self, lines: list[str]) -> None:
        """Raise on every rank unless all have the same lines; every rank must call this.

        Only a digest is exchanged, and the lines if digests differ.

        Args:
            lines: facts that must be the same on all ranks, such as the names of layers.

        Raises:
            ValueError: a rank has other lines; the message has the first that differs.
        """
        mine = torch.tensor([_number("\n".join(lines))], device=self._device)
        if bool((self.gather(mine, "the comparison of arguments and layers") == mine[0]).all()):
            return
        first, *rest = self.objects(lines)
        for rank, theirs in enumerate(rest, 1):
            for pair in zip_longest(first, theirs, fillvalue="no more layers"):
                if pair[0] != pair[1]:
                    raise ValueError(
                        f"the ranks differ: rank 0 has {pair[0]}, but rank {rank} has {pair[1]}; "
                        "expected the same model and arguments on every rank"
                    )

    def objects(self, value: T) -> list[T]:
        """Return the values of all ranks, anything that pickles; every rank must call this."""
        if self._group is None:
            return [value]
        with self._explained("an exchange of results"):
            return all_gather_objects(value, self._group)

    def sharing_memory(self) -> int:
        """Return how many of the ranks share this one's memory; every rank must call this."""
        where = socket.gethostname()
        if self._device.type == "cuda":
            where += str(torch.cuda.get_device_properties(self._device).uuid)
        mine = torch.tensor([_number(where)], device=self._device)
        return int((self.gather(mine) == mine).sum())

    def sum(self, vector: Tensor, label: str) -> Tensor:
        """Return a float64 vector summed over the ranks, with the same bits on all of them."""
        return all_reduce(vector, self._group, label)

    def first(self, vector: Tensor) -> Tensor:
        """Return the vector of the first rank, in place; every rank must call this."""
        if self._group is not None:
            with self._explained("the exchange of the old statistics"):
                dist.broadcast(vector, dist.get_global_rank(self._group, 0), group=self._group)
        return vector

    def gather(self, vector: Tensor, step: str = "an exchange of statistics") -> Tensor:
        """Return the vectors of all ranks, ``[W, n]``.

        Args:
            vector: shape ``[n]``.
            step: part of the calibration, for error messages.

        Raises:
            RuntimeError: a rank cannot be reached.
        """
        rows = vector.new_empty(self.size, vector.numel())
        if self._group is None:
            rows[0] = vector
        else:
            with self._explained(step):
                dist.all_gather(list(rows), vector.contiguous(), group=self._group)
        return rows

    def _gather(self, numbers: list[int], step: str) -> Tensor:
        return self.gather(torch.tensor(numbers, device=self._device), step).cpu()

    @contextmanager
    def _explained(self, step: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"calibration failed on rank {self.rank} of {self.size} in {step}: a rank has "
                "ended, cannot be reached, or has not come here in time. Look for the first error "
                f"of the other ranks, then start all ranks again ({error})"
            ) from error


def _number(text: str) -> int:
    """Return a hash of a text, 56 bits: the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
