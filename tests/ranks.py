"""Pools of worker processes, one per rank of a group, started once per test run."""

from __future__ import annotations

import pickle
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests import device, transports

# Timeout of a rank that waits for a failed rank: shorter than pytest's timeout, which would end the
# whole run.
COLLECTIVE_TIMEOUT = 20.0
CALL_TIMEOUT = 90.0


class RankError(AssertionError):
    """A function raised on some ranks; the message holds their tracebacks."""


class Ranks:
    """The ranks of a group.

    Args:
        size: number of ranks.
        transport: one of :data:`tests.transports.TRANSPORTS`.
    """

    def __init__(self, size: int, transport: str = "gloo") -> None:
        self.size = size
        self.transport = transport
        self._processes: list[subprocess.Popen[str]] = []
        self._connections: list[Connection] = []
        self._folder = Path()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(rank, *args)`` on every rank and return the results by rank.

        The function must be importable by name. After a failure the processes are restarted, since
        a rank that raised may have left other ranks in a collective.

        Raises:
            RankError: a rank raised, died or did not answer in time.
        """
        if not self._connections:
            self._start()
        for connection in self._connections:
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
        """End the workers: they destroy their group when the connection closes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()
        if self._processes:
            shutil.rmtree(self._folder)
        self._processes, self._connections = [], []

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp())
        program = (
            *("-m", "tests.worker", self.transport, self._folder),
            *(str(COLLECTIVE_TIMEOUT), device.get_impl()),
        )
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._folder / "socket"))
            listener.listen(self.size)
            listener.settimeout(CALL_TIMEOUT)
            self._processes = transports.start(
                self.transport, self.size, program, outlives_ranks=True
            )
            ranked = dict(_accept(listener) for _ in range(self.size))
        self._connections = [ranked[rank] for rank in range(self.size)]

    def _collect(self) -> list[tuple[bool, Any]]:
        answers: list[tuple[bool, Any]] = [(False, "no answer in time")] * self.size
        pending = {connection: rank for rank, connection in enumerate(self._connections)}
        deadline = time.monotonic() + CALL_TIMEOUT
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                answers[pending.pop(connection)] = _receive(connection)
        return answers


def _accept(listener: socket.socket) -> tuple[int, Connection]:
    accepted, _ = listener.accept()
    connection = Connection(accepted.detach())
    rank: int = connection.recv()
    return rank, connection


def _receive(connection: Connection) -> tuple[bool, Any]:
    try:
        answer: tuple[bool, Any] = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return False, "died"
    return answer


#: Type of the fixture that returns the ranks for a size and transport.
Pool = Callable[[int, str], Ranks]
