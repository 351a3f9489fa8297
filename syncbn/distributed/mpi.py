"""The backend "mpi4py" of torch.distributed: a process group on an MPI communicator.

Every collective starts non-blocking MPI requests and returns a work object that polls them
(:mod:`syncbn.distributed.mpi_work`), so that waiting for a rank that is gone ends with an error.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from syncbn.distributed import mpi_collectives as collectives
from syncbn.distributed.mpi_exit import end_job, end_job_after_error
from syncbn.distributed.mpi_library import MPI, start
from syncbn.distributed.mpi_watch import Watch, meet
from syncbn.distributed.mpi_work import MPIWork, Progress, Transfer
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
        world = MPI.COMM_WORLD
        peers = meet(store, rank, size, timeout.total_seconds(), world.rank, world.size)
        world_ranks = [peer.world_rank for peer in peers]
        if len(set(world_ranks)) < size:
            raise RuntimeError(
                f"the {size} ranks of the group are ranks {world_ranks} of MPI.COMM_WORLD, which "
                "must differ; start the job with mpirun, or use backend 'gloo' with torchrun"
            )
        members = world.group.Incl(world_ranks)
        self._communicator = world.Create_group(members)
        members.Free()
        self._communicator.Set_errhandler(MPI.ERRORS_RETURN)
        self._watch = Watch(store, rank, peers, timeout.total_seconds())
        self._progress = Progress(f"syncbn-mpi-{rank}")
        self._numbers = count(1)
        atexit.register(self._leave)

    # The lists hold one tensor each, except where a collective is coalesced.

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Reduce over all ranks, in place."""
        opts = opts or dist.AllreduceOptions()
        op, group = opts.reduceOp, self._communicator
        transfers = (collectives.all_reduce(group, tensor, op) for tensor in tensors)
        return self._start("all_reduce", transfers, tensors, opts.asyncOp)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Copy from one rank to all."""
        opts = opts or dist.BroadcastOptions()
        root, group = opts.rootRank, self._communicator
        transfers = (collectives.broadcast(group, tensor, root) for tensor in tensors)
        return self._start("broadcast", transfers, tensors, opts.asyncOp)

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Reduce to one rank; the others keep their tensors."""
        opts = opts or dist.ReduceOptions()
        op, root, group = opts.reduceOp, opts.rootRank, self._communicator
        transfers = (collectives.reduce(group, tensor, op, root) for tensor in tensors)
        return self._start("reduce", transfers, tensors, opts.asyncOp)

    def allgather(
        self,
        output_lists: list[list[Tensor]],
        tensors: list[Tensor],
        opts: Any = None,
    ) -> MPIWork:
        """Gather on every rank, in one tensor a rank; sizes may differ between ranks."""
        pairs = zip(output_lists, tensors, strict=True)
        transfers = (collectives.all_gather(self._communicator, *pair) for pair in pairs)
        return self._start("all_gather", transfers, _joined(output_lists), _is_async(opts))

    def allgather_coalesced(
        self,
        output_lists: list[list[Tensor]],
        tensors: list[Tensor],
        opts: Any = None,
    ) -> MPIWork:
        """Gather several tensors; the outputs are listed by rank, then by tensor."""
        by_tensor = [list(outputs) for outputs in zip(*output_lists, strict=True)]
        return self.allgather(by_tensor, tensors, opts)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> MPIWork:
        """Gather on every rank, in one tensor."""
        return self.all_gather_single_coalesced([output], [tensor], opts)

    def all_gather_single_coalesced(
        self,
        outputs: list[Tensor],
        tensors: list[Tensor],
        opts: Any = None,
    ) -> MPIWork:
        """Gather several tensors, each in one."""
        pairs = zip(outputs, tensors, strict=True)
        transfers = (collectives.all_gather_single(self._communicator, *pair) for pair in pairs)
        return self._start("all_gather_single", transfers, outputs, _is_async(opts))

    def reduce_scatter(
        self,
        outputs: list[Tensor],
        input_lists: list[list[Tensor]],
        opts: Any = None,
    ) -> MPIWork:
        """Reduce, leaving one of the inputs' sums on each rank; sizes may differ."""
        opts = opts or dist.ReduceScatterOptions()
        op, group = opts.reduceOp, self._communicator
        pairs = zip(outputs, input_lists, strict=True)
        transfers = (collectives.reduce_scatter(group, *pair, op) for pair in pairs)
        return self._start("reduce_scatter", transfers, outputs, opts.asyncOp)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> MPIWork:
        """Reduce one tensor, leaving an equal part of the sum on each rank."""
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(
        self,
        outputs: list[Tensor],
        tensors: list[Tensor],
        opts: Any = None,
    ) -> MPIWork:
        """Reduce several tensors, leaving an equal part of each sum on each rank."""
        parts = [
            collectives.splits(tensor.reshape(-1), (), self._size, "reduce_scatter_single")
            for tensor in tensors
        ]
        return self.reduce_scatter(outputs, parts, opts)

    def gather(
        self,
        output_lists: list[list[Tensor]],
        tensors: list[Tensor],
        opts: Any = None,
    ) -> MPIWork:
        """Gather on one rank; the others pass no outputs."""
        opts = opts or dist.GatherOptions()
        root, group = opts.rootRank, self._communicator
        lists = output_lists or [[] for _ in tensors]
        pairs = zip(lists, tensors, strict=True)
        transfers = (collectives.gather(group, *pair, root) for pair in pairs)
        return self._start("gather", transfers, _joined(output_lists), opts.asyncOp)

    def scatter(
        self,
        outputs: list[Tensor],
        input_lists: list[list[Tensor]],
        opts: Any = None,
    ) -> MPIWork:
        """Hand out one rank's tensors; the others pass no inputs."""
        opts = opts or dist.ScatterOptions()
        root, group = opts.rootRank, self._communicator
        lists = input_lists or [[] for _ in outputs]
        pairs = zip(outputs, lists, strict=True)
        transfers = (collectives.scatter(group, *pair, root) for pair in pairs)
        return self._start("scatter", transfers, outputs, opts.asyncOp)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> MPIWork:
        """Exchange one tensor with every rank; sizes may differ."""
        transfers = (collectives.all_to_all(self._communicator, outputs, inputs) for _ in (1,))
        return self._start("all_to_all", transfers, outputs, _is_async(opts))

    def all_to_all_single(
        self,
        output: Tensor,
        tensor: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
    ) -> MPIWork:
        """Exchange parts of one tensor along its first dimension."""
        name = "all_to_all_single"
        return self.alltoall(
            collectives.splits(output, output_splits, self._size, name),
            collectives.splits(tensor, input_splits, self._size, name),
            opts,
        )

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> MPIWork:
        """Send to one rank."""
        group = self._communicator
        transfers = (collectives.send(group, tensor, destination, tag) for tensor in tensors)
        return self._start(f"send to rank {destination}", transfers, tensors, peer=destination)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> MPIWork:
        """Receive from one rank."""
        group = self._communicator
        transfers = (collectives.receive(group, tensor, source, tag) for tensor in tensors)
        return self._start(f"recv from rank {source}", transfers, tensors, peer=source)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> MPIWork:
        """Receive from whoever sends first; the work object knows who."""
        group, anyone = self._communicator, MPI.ANY_SOURCE
        transfers = (collectives.receive(group, tensor, anyone, tag) for tensor in tensors)
        return self._start("recv from any rank", transfers, tensors)

    def barrier(self, opts: Any = None) -> MPIWork:
        """Wait for all ranks."""
        opts = opts or dist.BarrierOptions()
        transfers = (Transfer(self._communicator.Ibarrier(), ()) for _ in (1,))
        timeout = opts.timeout if opts.timeout > timedelta(0) else None
        return self._start("barrier", transfers, [], opts.asyncOp, timeout)

    # The names of these before torch 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def _start(
        self,
        name: str,
        transfers: Iterable[Transfer],
        results: list[Tensor],
        asynchronous: bool = True,
        timeout: timedelta | None = None,
        peer: int | None = None,
    ) -> MPIWork:
        operation = f"{name} #{next(self._numbers)}"
        if self._watch.failure:
            raise RuntimeError(f"{operation}: the process group is broken: {self._watch.failure}")
        started: list[Transfer] = []
        try:
            started.extend(transfers)
        except MPI.Exception as error:
            self._progress.abandon(started)
            reason = f"could not be started: {error.Get_error_string()}"
            raise RuntimeError(self._watch.fail(operation, reason)) from error
        seconds = None if timeout is None else timeout.total_seconds()
        work = MPIWork(operation, started, results, self._progress, self._watch, seconds, peer)
        if asynchronous:
            self._progress.add(work)
        return work

    # The end.

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long operations may take, those under way included."""
        self._watch.timeout = timeout.total_seconds()

    def shutdown(self) -> None:
        """Finish what is under way and free the communicator; not if the group is broken.

        Raises:
            RuntimeError: an operation under way failed.
        """
        if self._watch.failure:
            return
        self._progress.close()
        self._communicator.Free()
        atexit.unregister(self._leave)

    def abort(self) -> None:
        """Give up the group; the other ranks notice when they wait for this one."""
        self._watch.fail("abort()", "was called")

    def _leave(self) -> None:
        # At exit. Work that other ranks wait for is finished first, unless all is lost anyway.
        end_job_after_error()
        try:
            self._watch.leave()
            self._progress.close()
        except RuntimeError as error:
            sys.stderr.write(f"{error}\n")
        if self._watch.failure:
            end_job()


def _is_async(opts: Any) -> bool:
    return opts is None or bool(opts.asyncOp)


def _joined(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [tensor for tensors in lists for tensor in tensors]
