"""What a group of MPI ranks is: its members, its communicator, its work under way, its end."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from syncbn.distributed import mpi_agreement
from syncbn.distributed.agreement import as_bytes, disagreement
from syncbn.distributed.mpi_collectives import all_gather_single
from syncbn.distributed.mpi_communicator import create_communicator
from syncbn.distributed.mpi_exit import end_job, end_job_after_error, watch_for_errors
from syncbn.distributed.mpi_library import MPI, start
from syncbn.distributed.mpi_peers import meet, myself
from syncbn.distributed.mpi_progress import Progress
from syncbn.distributed.mpi_watch import Need, Watch
from syncbn.distributed.mpi_work import MPIWork, Transfer, are_over
from syncbn.distributed.python_group import PythonProcessGroup

BACKEND = "mpi4py"


class MPIMembers(PythonProcessGroup):
    """A process group on a communicator of its own, without its collectives.

    Args:
        store: of this group alone; the members find each other by it.
        rank: of this process in the group.
        size: of the group.
        timeout: of an operation and of the meeting of the members.

    Raises:
        RuntimeError: a member did not come in time; MPI cannot serve threads; the members are not
            the processes of one MPI job.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(BACKEND, store, rank, size)
        start(timeout)
        watch_for_errors()
        # A store may serve groups of the same name one after another.
        generation = store.add(f"joined/{rank}", 1)
        own_store = dist.PrefixStore(str(generation), store)
        seconds = timeout.total_seconds()
        self._peers = peers = meet(own_store, rank, size, seconds, myself(MPI.COMM_WORLD.rank))
        self._communicator = create_communicator([peer.world_rank for peer in peers], seconds)
        self._watch = Watch(own_store, rank, peers, seconds)
        self._progress = Progress(f"syncbn-mpi-{rank}")
        # On all ranks, or they would wait for each other in different operations.
        self._compares = any(peer.compares for peer in peers)
        self._over = MPIWork("", [], [], Need(), self._progress, self._watch)
        self._over.wait()
        self._collectives = self._messages = 0
        atexit.register(self._leave, os.getpid())

    def _collect(
        self,
        name: str,
        transfers: Iterable[Transfer],
        results: list[Tensor],
        opts: Any,
        ranks: Sequence[int] = (),
        timeout: float | None = None,
    ) -> MPIWork:
        self._collectives += 1
        if self._compares:
            self._require_agreement(name, mpi_agreement.describe(name, results, opts))
        need = Need(self._collectives, ranks, timeout)
        asynchronous = opts is None or getattr(opts, "asyncOp", True)
        work = self._start(
            f"{name} #{self._collectives}", transfers, results, need, at_once=not asynchronous
        )
        if asynchronous:
            self._progress.add(work)
        return work

    def _require_agreement(self, name: str, description: str) -> None:
        mine = as_bytes(description)
        texts = mine.new_empty(self._size, len(mine))
        gather = map(all_gather_single, [self._communicator], [texts], [mine])
        need = Need(self._collectives)
        self._start(f"comparison before {name} #{self._collectives}", gather, [], need).wait()
        if lines := disagreement(texts, [peer.world_rank for peer in self._peers]):
            raise RuntimeError(f"the ranks disagree on collective #{self._collectives}:\n{lines}")

    def _message(
        self, name: str, transfers: Iterable[Transfer], results: list[Tensor], peer: int | None
    ) -> MPIWork:
        self._messages += 1
        need = Need(ranks=None if peer is None else (peer,))
        work = self._start(f"{name} #{self._messages}", transfers, results, need)
        self._progress.add(work, soon=False)
        return work

    def _start(
        self,
        name: str,
        transfers: Iterable[Transfer],
        results: list[Tensor],
        need: Need,
        at_once: bool = False,
    ) -> MPIWork:
        # With at_once the caller waits next and for nothing but the end: an operation that is over
        # before its work object is made gets the one that all of them share.
        if self._watch.failure:
            self._watch.has_told = True
            raise RuntimeError(f"{name}: the process group is broken: {self._watch.failure}")
        started: list[Transfer] = []
        try:
            started.extend(transfers)
            if at_once and are_over(started):
                return self._over
        except MPI.Exception as error:
            self._progress.abandon(started)
            self._watch.has_told = True
            reason = f"failed: {error.Get_error_string()}"
            raise RuntimeError(self._watch.fail(name, reason)) from error
        except BaseException:
            # What has been started goes on: the other ranks may be in it.
            work = MPIWork(name, started, results, need, self._progress, self._watch)
            self._progress.add(work)
            raise
        return MPIWork(name, started, results, need, self._progress, self._watch)

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long operations may take, those under way included."""
        self._watch.timeout = timeout.total_seconds()

    def shutdown(self) -> None:
        """Finish what is under way and free the communicator; not if the group is broken.

        Raises:
            RuntimeError: an operation has failed, and nobody knows yet.
        """
        if self._communicator == MPI.COMM_NULL:
            return
        if not self._watch.failure:
            self._progress.close()
            self._communicator.Free()
            self._watch.leave(self._collectives, keeps_store=self._keeps_store)
            atexit.unregister(self._leave)
        elif not self._watch.has_told:
            self._watch.has_told = True
            raise RuntimeError(self._watch.failure)

    def abort(self) -> None:
        """Give up the group; the other ranks notice when they wait for this one."""
        self._watch.fail("abort()", "was called")

    def _leave(self, pid: int) -> None:
        # At exit, with a group that was not destroyed. A forked child is no rank.
        if pid != os.getpid():
            return
        end_job_after_error(pid)  # before waiting for anything
        told = self._watch.has_told
        with suppress(RuntimeError):  # which the watch knows
            self._progress.close()
        if self._watch.failure:
            if not told:
                sys.stderr.write(f"{self._watch.failure}\n")
            end_job()
        self._watch.leave(self._collectives, keeps_store=self._keeps_store)

    @property
    def _keeps_store(self) -> bool:
        # The store of all groups is that of the first, whose description this is, and its rank 0's.
        return self._rank == 0 and self._description == "default_pg"
