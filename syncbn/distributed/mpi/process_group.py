"""The backend "mpi4py" of torch.distributed: a process group on an MPI communicator.

Every collective starts non-blocking MPI requests and returns a work object that polls them
(:mod:`syncbn.distributed.mpi.work`), so a wait for a rank that has ended raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from syncbn.distributed.mpi import collectives, ensure_initialized
from syncbn.distributed.mpi.buffers import PendingRequest
from syncbn.distributed.mpi.lifecycle import BACKEND, GroupLifecycle
from syncbn.distributed.mpi.work import MPIWork


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

    def _run(
        self,
        collective: Callable[..., PendingRequest],
        calls: Iterable[tuple[Any, ...]],
        results: list[Tensor],
        opts: Any,
        *arguments: Any,
        ranks: Sequence[int] = (),
    ) -> MPIWork:
        requests = (collective(self._comm, *call, *arguments) for call in calls)
        return self._collect(collective.__name__, requests, results, opts, ranks)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Reduce over all ranks, in place."""
        opts = opts or dist.AllreduceOptions()
        return self._run(collectives.all_reduce, zip(tensors), tensors, opts, opts.reduceOp)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Copy from one rank to all."""
        opts = opts or dist.BroadcastOptions()
        root, ranks = opts.rootRank, self._sources(opts.rootRank)
        return self._run(collectives.broadcast, zip(tensors), tensors, opts, root, ranks=ranks)

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> MPIWork:
        """Reduce to one rank; the tensors of other ranks keep their values."""
        opts = opts or dist.ReduceOptions()
        op, root = opts.reduceOp, opts.rootRank
        return self._run(collectives.reduce, zip(tensors), tensors, opts, op, root)

    def allgather(
        self, output_lists: list[list[Tensor]], tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Gather on every rank into one tensor per rank; sizes may differ between ranks."""
        calls = zip(output_lists, tensors, strict=True)
        return self._run(collectives.all_gather, calls, list(chain(*output_lists)), opts)

    def allgather_coalesced(
        self, output_lists: list[list[Tensor]], tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Gather several tensors; the outputs are listed by rank, then by tensor."""
        calls = zip(zip(*output_lists, strict=True), tensors, strict=True)
        return self._run(collectives.all_gather, calls, list(chain(*output_lists)), opts)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> MPIWork:
        """Gather on every rank into one tensor."""
        return self.all_gather_single_coalesced([output], [tensor], opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Gather several tensors, each into one output."""
        calls = zip(outputs, tensors, strict=True)
        return self._run(collectives.all_gather_single, calls, outputs, opts)

    def reduce_scatter(
        self, outputs: list[Tensor], input_lists: list[list[Tensor]], opts: Any = None
    ) -> MPIWork:
        """Reduce a list of tensors; rank i receives the i-th sum. Sizes may differ."""
        opts = opts or dist.ReduceScatterOptions()
        calls = zip(outputs, input_lists, strict=True)
        return self._run(collectives.reduce_scatter, calls, outputs, opts, opts.reduceOp)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> MPIWork:
        """Reduce one tensor; each rank receives an equal part of the sum."""
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Reduce several tensors; each rank receives an equal part of each sum."""
        opts = opts or dist.ReduceScatterOptions()
        calls = zip(outputs, tensors, strict=True)
        return self._run(collectives.reduce_scatter_single, calls, outputs, opts, opts.reduceOp)

    def gather(
        self, output_lists: list[list[Tensor]], tensors: list[Tensor], opts: Any = None
    ) -> MPIWork:
        """Gather on one rank; other ranks pass no outputs."""
        opts = opts or dist.GatherOptions()
        calls = zip(output_lists or [[] for _ in tensors], tensors, strict=True)
        results = list(chain(*output_lists))
        return self._run(collectives.gather, calls, results, opts, opts.rootRank)

    def scatter(
        self, outputs: list[Tensor], input_lists: list[list[Tensor]], opts: Any = None
    ) -> MPIWork:
        """Scatter one rank's tensors; other ranks pass no inputs."""
        opts = opts or dist.ScatterOptions()
        root, ranks = opts.rootRank, self._sources(opts.rootRank)
        calls = zip(outputs, input_lists or [[] for _ in outputs], strict=True)
        return self._run(collectives.scatter, calls, outputs, opts, root, ranks=ranks)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> MPIWork:
        """Exchange one tensor with every rank; sizes may differ."""
        return self._run(collectives.all_to_all, [(outputs, inputs)], outputs, opts)

    def all_to_all_single(
        self,
        output: Tensor,
        tensor: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
    ) -> MPIWork:
        """Exchange parts of one tensor along its first dimension."""
        calls = [(output, tensor, output_splits, input_splits)]
        return self._run(collectives.all_to_all_single, calls, [output], opts)

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> MPIWork:
        """Send to one rank."""
        requests = (collectives.send(self._comm, tensor, destination, tag) for tensor in tensors)
        return self._message(f"send to rank {destination}", requests, tensors, destination)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> MPIWork:
        """Receive from one rank."""
        requests = (collectives.receive(self._comm, tensor, source, tag) for tensor in tensors)
        return self._message(f"recv from rank {source}", requests, tensors, source)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> MPIWork:
        """Receive the first message of any rank; the work object has its source."""
        requests = (collectives.receive(self._comm, tensor, None, tag) for tensor in tensors)
        return self._message("recv from any rank", requests, tensors, None)

    def barrier(self, opts: Any = None) -> MPIWork:
        """Wait for all ranks."""
        opts = opts or dist.BarrierOptions()
        requests = map(collectives.barrier, [self._comm])
        timeout = opts.timeout.total_seconds() if opts.timeout > timedelta(0) else None
        return self._collect("barrier", requests, [], opts, timeout=timeout)

    def _sources(self, root: int) -> Sequence[int]:
        return () if root == self._rank else (root,)
