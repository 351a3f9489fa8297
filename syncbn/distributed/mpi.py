"""The backend "mpi4py" of torch.distributed: a process group on an MPI communicator.

Every collective starts non-blocking MPI requests and returns a work object that polls them
(:mod:`syncbn.distributed.mpi_work`), so that waiting for a rank that is gone ends with an error.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from syncbn.distributed import mpi_collectives as collectives
from syncbn.distributed.mpi_communicator import create_communicator
from syncbn.distributed.mpi_exit import end_job, end_job_after_error, watch_for_errors
from syncbn.distributed.mpi_library import MPI, start
from syncbn.distributed.mpi_peers import meet
from syncbn.distributed.mpi_progress import Progress
from syncbn.distributed.mpi_watch import Need, Watch
from syncbn.distributed.mpi_work import MPIWork, Transfer
from syncbn.distributed.python_group import PythonProcessGroup

BACKEND = "mpi4py"


def register(timeout: timedelta = default_pg_timeout) -> None:
    """Start MPI and make "mpi4py" a backend of torch.distributed, for CPU and CUDA tensors.

    Args:
        timeout: how long to wait for the other ranks of the MPI job.

    Raises:
        RuntimeError: ranks are missing, or MPI cannot serve threads.
    """
    start(timeout)
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, MPIProcessGroup, devices=["cpu", "cuda"])


class MPIProcessGroup(PythonProcessGroup):
    """A process group whose messages MPI carries, on a communicator of its own.

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
        peers = meet(own_store, rank, size, seconds, MPI.COMM_WORLD.rank)
        self._communicator = create_communicator([peer.world_rank for peer in peers], seconds)
        self._watch = Watch(own_store, rank, peers, seconds)
        self._progress = Progress(f"syncbn-mpi-{rank}")
        self._collectives = self._messages = 0
        atexit.register(self._leave, os.getpid())

    # The lists hold one tensor each, except where a collective is coalesced.

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Reduce over all ranks, in place."""
        opts = opts or dist.AllreduceOptions()
        op, group = opts.reduceOp, self._communicator
        transfers = (collectives.all_reduce(group, tensor, op) for tensor in tensors)
        return self._collect("all_reduce", transfers, tensors, opts)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Copy from one rank to all."""
        opts = opts or dist.BroadcastOptions()
        root, group = opts.rootRank, self._communicator
        transfers = (collectives.broadcast(group, tensor, root) for tensor in tensors)
        return self._collect(
            "broadcast", transfers, tensors, opts, () if root == self._rank else (root,)
        )

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Reduce to one rank; the others keep their tensors."""
        opts = opts or dist.ReduceOptions()
        op, root, group = opts.reduceOp, opts.rootRank, self._communicator
        transfers = (collectives.reduce(group, tensor, op, root) for tensor in tensors)
        return self._collect("reduce", transfers, tensors, opts)

    def allgather(
        self, output_lists: list[list[Tensor]], tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Gather on every rank, in one tensor a rank; sizes may differ between ranks."""
        pairs = zip(output_lists, tensors, strict=True)
        transfers = (collectives.all_gather(self._communicator, *pair) for pair in pairs)
        return self._collect("all_gather", transfers, list(chain(*output_lists)), opts)

    def allgather_coalesced(
        self, output_lists: list[list[Tensor]], tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Gather several tensors; the outputs are listed by rank, then by tensor."""
        pairs = zip(zip(*output_lists, strict=True), tensors, strict=True)
        transfers = (collectives.all_gather(self._communicator, *pair) for pair in pairs)
        return self._collect("all_gather", transfers, list(chain(*output_lists)), opts)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> MPIWork:
        """Gather on every rank, in one tensor."""
        return self.all_gather_single_coalesced([output], [tensor], opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Gather several tensors, each in one."""
        pairs = zip(outputs, tensors, strict=True)
        transfers = (collectives.all_gather_single(self._communicator, *pair) for pair in pairs)
        return self._collect("all_gather_single", transfers, outputs, opts)

    def reduce_scatter(
        self, outputs: list[Tensor], input_lists: list[list[Tensor]], opts: Any = None
    ) -> MPIWork:
        """Reduce, leaving one of the inputs' sums on each rank; sizes may differ."""
        opts = opts or dist.ReduceScatterOptions()
        op, group = opts.reduceOp, self._communicator
        pairs = zip(outputs, input_lists, strict=True)
        transfers = (collectives.reduce_scatter(group, *pair, op) for pair in pairs)
        return self._collect("reduce_scatter", transfers, outputs, opts)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> MPIWork:
        """Reduce one tensor, leaving an equal part of the sum on each rank."""
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Reduce several tensors, leaving an equal part of each sum on each rank."""
        opts = opts or dist.ReduceScatterOptions()
        op, group = opts.reduceOp, self._communicator
        pairs = zip(outputs, tensors, strict=True)
        transfers = (collectives.reduce_scatter_single(group, *pair, op) for pair in pairs)
        return self._collect("reduce_scatter_single", transfers, outputs, opts)

    def gather(
        self, output_lists: list[list[Tensor]], tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Gather on one rank; the others pass no outputs."""
        opts = opts or dist.GatherOptions()
        root, group = opts.rootRank, self._communicator
        lists = output_lists or [[] for _ in tensors]
        pairs = zip(lists, tensors, strict=True)
        transfers = (collectives.gather(group, *pair, root) for pair in pairs)
        return self._collect("gather", transfers, list(chain(*output_lists)), opts)

    def scatter(
        self, outputs: list[Tensor], input_lists: list[list[Tensor]], opts: Any = None
    ) -> MPIWork:
        """Hand out one rank's tensors; the others pass no inputs."""
        opts = opts or dist.ScatterOptions()
        root, group = opts.rootRank, self._communicator
        lists = input_lists or [[] for _ in outputs]
        pairs = zip(outputs, lists, strict=True)
        transfers = (collectives.scatter(group, *pair, root) for pair in pairs)
        return self._collect(
            "scatter", transfers, outputs, opts, () if root == self._rank else (root,)
        )

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> MPIWork:
        """Exchange one tensor with every rank; sizes may differ."""
        transfers = (collectives.all_to_all(self._communicator, outputs, inputs) for _ in (1,))
        return self._collect("all_to_all", transfers, outputs, opts)

    def all_to_all_single(
        self,
        output: Tensor,
        tensor: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
    ) -> MPIWork:
        """Exchange parts of one tensor along its first dimension."""
        splits = (output_splits, input_splits)
        transfers = (
            collectives.all_to_all_single(self._communicator, output, tensor, *splits) for _ in (1,)
        )
        return self._collect("all_to_all_single", transfers, [output], opts)

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> MPIWork:
        """Send to one rank."""
        group = self._communicator
        transfers = (collectives.send(group, tensor, destination, tag) for tensor in tensors)
        return self._message(f"send to rank {destination}", transfers, tensors, destination)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> MPIWork:
        """Receive from one rank."""
        group = self._communicator
        transfers = (collectives.receive(group, tensor, source, tag) for tensor in tensors)
        return self._message(f"recv from rank {source}", transfers, tensors, source)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> MPIWork:
        """Receive from whoever sends first; the work object knows who."""
        group = self._communicator
        transfers = (collectives.receive(group, tensor, None, tag) for tensor in tensors)
        return self._message("recv from any rank", transfers, tensors, None)

    def barrier(self, opts: Any = None) -> MPIWork:
        """Wait for all ranks."""
        opts = opts or dist.BarrierOptions()
        transfers = (Transfer(self._communicator.Ibarrier(), ()) for _ in (1,))
        timeout = opts.timeout.total_seconds() if opts.timeout > timedelta(0) else None
        return self._collect("barrier", transfers, [], opts, timeout=timeout)

    # The names of these before torch 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

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
        need = Need(self._collectives, ranks, timeout)
        work = self._start(f"{name} #{self._collectives}", transfers, results, need)
        if opts is None or getattr(opts, "asyncOp", True):
            self._progress.add(work)
        return work

    def _message(
        self, name: str, transfers: Iterable[Transfer], results: list[Tensor], peer: int | None
    ) -> MPIWork:
        self._messages += 1
        need = Need(ranks=None if peer is None else (peer,))
        work = self._start(f"{name} #{self._messages}", transfers, results, need)
        self._progress.add(work, soon=False)
        return work

    def _start(
        self, name: str, transfers: Iterable[Transfer], results: list[Tensor], need: Need
    ) -> MPIWork:
        if self._watch.failure:
            raise RuntimeError(f"{name}: the process group is broken: {self._watch.failure}")
        started: list[Transfer] = []
        try:
            started.extend(transfers)
        except BaseException as error:
            self._progress.abandon(started)
            if not isinstance(error, MPI.Exception):
                raise
            reason = f"could not be started: {error.Get_error_string()}"
            raise RuntimeError(self._watch.fail(name, reason)) from error
        return MPIWork(name, started, results, need, self._progress, self._watch)

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long operations may take, those under way included."""
        self._watch.timeout = timeout.total_seconds()

    def shutdown(self) -> None:
        """Finish what is under way and free the communicator; not if the group is broken.

        Raises:
            RuntimeError: an operation has failed, and nobody knows yet.
        """
        if not self._watch.failure:
            self._progress.close()
            self._communicator.Free()
            self._watch.leave(self._collectives)
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
        with suppress(RuntimeError):  # which the watch knows
            self._progress.close()
        if self._watch.failure:
            if not self._watch.has_told:
                sys.stderr.write(f"{self._watch.failure}\n")
            end_job()
        self._watch.leave(self._collectives)
