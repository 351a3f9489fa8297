"""The backend "mpi4py" of torch.distributed: a process group on an MPI communicator.

Every collective starts non-blocking MPI requests and returns a work object that polls them
(:mod:`syncbn.distributed.mpi_work`), so that waiting for a rank that is gone ends with an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from syncbn.distributed import mpi_collectives as collectives
from syncbn.distributed.mpi_library import start
from syncbn.distributed.mpi_members import BACKEND, MPIMembers
from syncbn.distributed.mpi_work import MPIWork


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


class MPIProcessGroup(MPIMembers):
    """A process group whose messages MPI carries; its arguments are those of :class:`MPIMembers`.

    The methods are those that torch.distributed calls. Their lists hold one tensor each, except
    where a collective is coalesced.
    """

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
        exchange = partial(collectives.all_to_all, self._communicator)
        transfers = map(exchange, [outputs], [inputs])
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
        exchange = partial(collectives.all_to_all_single, self._communicator)
        transfers = map(exchange, [output], [tensor], [output_splits], [input_splits])
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
        transfers = map(collectives.barrier, [self._communicator])
        timeout = opts.timeout.total_seconds() if opts.timeout > timedelta(0) else None
        return self._collect("barrier", transfers, [], opts, timeout=timeout)

    # The names of these before torch 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single
