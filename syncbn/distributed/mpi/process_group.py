"""The backend "mpi4py" of torch.distributed: a process group on an MPI communicator.

Every collective starts non-blocking MPI requests and returns a work object that polls them
(:mod:`syncbn.distributed.mpi.work`), so a wait for a rank that has ended raises an error.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import chain
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import AllgatherOptions

from syncbn.distributed.mpi import collectives, ensure_initialized
from syncbn.distributed.mpi.lifecycle import BACKEND, GroupLifecycle
from syncbn.distributed.mpi.work import MPIWork

Lists: TypeAlias = list[list[Tensor]]
Rows: TypeAlias = list[int]


def register(timeout: timedelta = default_pg_timeout) -> None:
    """Initialize MPI and register "mpi4py" with torch.distributed, for CPU and CUDA tensors.

    Args:
        timeout: time limit of the wait for the other ranks of the MPI job.

    Raises:
        RuntimeError: ranks are missing, or MPI does not support threads.
    """
    ensure_initialized(timeout)
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, MPIProcessGroup, devices=["cpu", "cuda"])


class MPIProcessGroup(GroupLifecycle):
    """A process group over MPI, with the methods that torch.distributed calls.

    Lists of tensors have length 1, except in coalesced collectives.
    """

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Reduce over all ranks, in place."""
        opts = opts or dist.AllreduceOptions()
        return self._collect(collectives.all_reduce, zip(tensors), tensors, opts, "reduceOp")

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Copy from one rank to all."""
        opts = opts or dist.BroadcastOptions()
        return self._collect(collectives.broadcast, zip(tensors), tensors, opts, "rootRank")

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Reduce to one rank; the tensors of other ranks keep their values."""
        opts = opts or dist.ReduceOptions()
        return self._collect(
            collectives.reduce, zip(tensors), tensors, opts, "reduceOp", "rootRank"
        )

    def allgather(self, outputs: Lists, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Gather on every rank into one tensor per rank; sizes may differ between ranks."""
        calls, opts = zip(outputs, tensors, strict=True), opts or AllgatherOptions()
        return self._collect(collectives.all_gather, calls, chain(*outputs), opts)

    def allgather_coalesced(
        self, outputs: Lists, tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Gather several tensors; the outputs are listed by rank, then by tensor."""
        calls = zip(zip(*outputs, strict=True), tensors, strict=True)
        opts = opts or AllgatherOptions()
        return self._collect(collectives.all_gather, calls, chain(*outputs), opts)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> MPIWork:
        """Gather on every rank into one tensor."""
        return self.all_gather_single_coalesced([output], [tensor], opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Gather several tensors, each into one output."""
        calls, opts = zip(outputs, tensors, strict=True), opts or AllgatherOptions()
        return self._collect(collectives.all_gather_single, calls, outputs, opts)

    def reduce_scatter(self, outputs: list[Tensor], inputs: Lists, opts: Any = None) -> MPIWork:
        """Reduce a list of tensors; rank i receives the i-th sum. Sizes may differ."""
        calls, opts = zip(outputs, inputs, strict=True), opts or dist.ReduceScatterOptions()
        return self._collect(collectives.reduce_scatter, calls, outputs, opts, "reduceOp")

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> MPIWork:
        """Reduce one tensor; each rank receives an equal part of the sum."""
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Reduce several tensors; each rank receives an equal part of each sum."""
        calls, opts = zip(outputs, tensors, strict=True), opts or dist.ReduceScatterOptions()
        return self._collect(collectives.reduce_scatter_single, calls, outputs, opts, "reduceOp")

    def gather(self, outputs: Lists, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Gather on one rank; other ranks pass no outputs."""
        calls = zip(outputs or [[] for _ in tensors], tensors, strict=True)
        opts = opts or dist.GatherOptions()
        return self._collect(collectives.gather, calls, chain(*outputs), opts, "rootRank")

    def scatter(self, outputs: list[Tensor], inputs: Lists, opts: Any = None) -> MPIWork:
        """Scatter one rank's tensors; other ranks pass no inputs."""
        calls = zip(outputs, inputs or [[] for _ in outputs], strict=True)
        opts = opts or dist.ScatterOptions()
        return self._collect(collectives.scatter, calls, outputs, opts, "rootRank")

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> MPIWork:
        """Exchange one tensor with every rank; sizes may differ."""
        calls, opts = [(outputs, inputs)], opts or dist.AllToAllOptions()
        return self._collect(collectives.all_to_all, calls, outputs, opts)

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, output_rows: Rows, input_rows: Rows, opts: Any = None
    ) -> MPIWork:
        """Exchange parts of one tensor along its first dimension."""
        calls, opts = [(output, tensor, output_rows, input_rows)], opts or dist.AllToAllOptions()
        return self._collect(collectives.all_to_all_single, calls, [output], opts)

    def barrier(self, opts: Any = None) -> MPIWork:
        """Wait for all ranks."""
        return self._collect(collectives.barrier, [()], [], opts or dist.BarrierOptions())

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> MPIWork:
        """Send to one rank."""
        return self._message("send to", collectives.send, tensors, destination, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> MPIWork:
        """Receive from one rank."""
        return self._message("recv from", collectives.receive, tensors, source, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> MPIWork:
        """Receive the first message of any rank; the work object has its source."""
        return self._message("recv from", collectives.receive, tensors, None, tag)
