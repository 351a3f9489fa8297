"""A pool of worker processes that are the ranks of a Gloo group, started once a test run."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A rank that waits for one that raised gives up after this, so that the test fails before pytest's
# own timeout would end the whole run.
COLLECTIVE_TIMEOUT = timedelta(seconds=20)
CALL_TIMEOUT = 45.0


class RankError(AssertionError):
    """A function raised on some ranks; the message holds their tracebacks."""


class Ranks:
    """Run a function on every rank of a group.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(rank, *args)`` on every rank and return the results by rank.

        The function must be importable by name. After a failure the pool is made anew, since a rank
        that raised may have left others in a collective.

        Raises:
            RankError: a rank raised, died or did not answer in time.
        """
        if not self._workers:
            self._start()
        for _, connection in self._workers:
            connection.send_bytes(pickle.dumps((function, args)))
        answers = self._collect()
        failed = [
            f"rank {rank} of {self.size}: {text}"
            for rank, (good, text) in enumerate(answers)
            if not good
        ]
        if failed:
            self.close()
            raise RankError("\n".join(failed))
        return [value for _, value in answers]

    def close(self) -> None:
        """End the workers."""
        for process, connection in self._workers:
            connection.close()
            process.terminate()
        for process, _ in self._workers:
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        rendezvous = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, self.size, rendezvous, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self) -> list[tuple[bool, Any]]:
        answers: list[tuple[bool, Any]] = [(False, "no answer in time")] * self.size
        pending = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        deadline = time.monotonic() + CALL_TIMEOUT
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                answers[pending.pop(connection)] = _receive(connection)
        return answers


def _receive(connection: Connection) -> tuple[bool, Any]:
    try:
        answer: tuple[bool, Any] = pickle.loads(connection.recv_bytes())
    except EOFError:
        return False, "died"
    return answer


def _work(rank: int, size: int, rendezvous: Path, connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.FileStore(str(rendezvous), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
    )
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, function(rank, *args))
        except Exception:
            answer = (False, traceback.format_exc())
        # Plain pickle: the connection's own would share tensors through files of this process.
        connection.send_bytes(pickle.dumps(answer))
