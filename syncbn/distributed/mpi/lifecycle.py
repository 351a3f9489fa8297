"""Creation, operations in flight and destruction of a group of MPI ranks."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.distributed.fingerprint import describe_mismatch, encode_label
from syncbn.distributed.mpi import (
    MPI,
    abort_after_error,
    abort_job,
    ensure_initialized,
    install_abort_handler,
)
from syncbn.distributed.mpi.buffers import PendingRequest, all_completed
from syncbn.distributed.mpi.collectives import all_gather_single
from syncbn.distributed.mpi.rendezvous import create_communicator, local_peer, rendezvous
from syncbn.distributed.mpi.watchdog import Dependencies, Watchdog
from syncbn.distributed.mpi.work import MPIWork, ProgressThread

BACKEND = "mpi4py"
_SENT_BY_ROOT = ("broadcast", "scatter")
# In other collectives, sizes may differ between ranks, or only one rank has results.
_EQUAL_SIZES = (
    "all_reduce", "broadcast", "reduce", "all_gather_single", "reduce_scatter_single"
)  # fmt: skip


class GroupLifecycle(dist.ProcessGroup):
    """A process group on its communicator, without the collectives.

    Args:
        store: store of this group, for the rendezvous.
        rank: rank of this process in the group.
        size: size of the group.
        timeout: time limit of an operation and of the rendezvous.

    Raises:
        RuntimeError: a member did not arrive in time, MPI does not support threads, or the members
            do not belong to one MPI job.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the stub lacks it
        ensure_initialized(timeout)
        install_abort_handler()
        self._name = self._description = ""
        self._rank, self._store = rank, store
        # A store may serve several groups of the same name in turn.
        generation = store.add(f"joined/{rank}", 1)
        group_store = dist.PrefixStore(str(generation), store)
        seconds = timeout.total_seconds()
        self._peers = peers = rendezvous(group_store, rank, size, seconds, local_peer())
        self._comm = create_communicator([peer.world_rank for peer in peers], seconds)
        self._watchdog = Watchdog(group_store, rank, peers, seconds)
        self._progress = ProgressThread(f"syncbn-mpi-{rank}")
        # On all ranks, since the comparison is a collective.
        self._debug = any(peer.debug for peer in peers)
        self._work = partial(MPIWork, progress=self._progress, watchdog=self._watchdog)
        self._completed = self._work("", [], [], Dependencies())
        self._completed.wait()
        self._collectives = self._messages = 0
        atexit.register(self._leave, os.getpid())

    def _collect(
        self,
        collective: Callable[..., PendingRequest],
        calls: Iterable[Iterable[Any]],
        results: Iterable[Tensor],
        opts: Any,
        *options: str,
    ) -> MPIWork:
        # Options are the fields of torch's opts that the collective takes.
        self._collectives += 1
        name, results = collective.__name__, list(results)
        arguments = [getattr(opts, option) for option in options]
        if self._debug:
            self._compare_labels(name, _label(name, results, opts))
        from_root = name in _SENT_BY_ROOT and opts.rootRank != self._rank
        ranks = (opts.rootRank,) if from_root else ()
        dependencies = Dependencies(self._collectives, ranks, opts.timeout)
        requests = (collective(self._comm, *call, *arguments) for call in calls)
        numbered = f"{name} #{self._collectives}"
        async_op = opts.asyncOp
        work = self._start(numbered, requests, results, dependencies, blocking=not async_op)
        if async_op:
            self._progress.add(work)
        return work

    def _compare_labels(self, name: str, label: str) -> None:
        encoded = encode_label(label)
        labels = encoded.new_empty(len(self._peers), len(encoded))
        gather = map(all_gather_single, [self._comm], [labels], [encoded])
        name = f"comparison before {name} #{self._collectives}"
        self._start(name, gather, [], Dependencies(self._collectives)).wait()
        if lines := describe_mismatch(labels, [peer.world_rank for peer in self._peers]):
            raise RuntimeError(f"the ranks disagree on collective #{self._collectives}:\n{lines}")

    def _message(
        self,
        name: str,
        operation: Callable[..., PendingRequest],
        tensors: list[Tensor],
        peer: int | None,
        tag: int,
    ) -> MPIWork:
        self._messages += 1
        numbered = f"{name} {'any rank' if peer is None else f'rank {peer}'} #{self._messages}"
        dependencies = Dependencies(ranks=None if peer is None else (peer,))
        requests = (operation(self._comm, tensor, peer, tag) for tensor in tensors)
        work = self._start(numbered, requests, tensors, dependencies)
        self._progress.add(work, wake=False)
        return work

    def _start(
        self,
        name: str,
        requests: Iterable[PendingRequest],
        results: list[Tensor],
        dependencies: Dependencies,
        blocking: bool = False,
    ) -> MPIWork:
        # A blocking caller only waits for completion: an operation that completes at once returns
        # a shared work object instead of a new one.
        if self._watchdog.failure:
            self._watchdog.error_reported = True
            raise RuntimeError(f"{name}: the process group is broken: {self._watchdog.failure}")
        started: list[PendingRequest] = []
        try:
            started.extend(requests)
            if blocking and all_completed(started):
                return self._completed
        except MPI.Exception as error:
            self._progress.keep_alive(started)
            self._watchdog.error_reported = True
            reason = f"failed: {error.Get_error_string()}"
            raise RuntimeError(self._watchdog.fail(name, reason)) from error
        except BaseException as error:
            # The started requests continue: the other ranks may take part in them.
            self._progress.add(self._work(name, started, results, dependencies))
            if isinstance(error, TypeError):
                raise TypeError(f"{name}: {error}") from error
            if isinstance(error, ValueError):
                raise ValueError(f"{name}: {error}") from error
            raise
        return self._work(name, started, results, dependencies)

    def set_timeout(self, timeout: timedelta) -> None:
        """Set the time limit of operations, also of operations in flight."""
        self._watchdog.timeout = timeout.total_seconds()

    def shutdown(self) -> None:
        """Complete the operations in flight and free the communicator, unless the group is broken.

        Raises:
            RuntimeError: an operation has failed, and the error has not been reported yet.
        """
        if self._comm == MPI.COMM_NULL:
            return
        if not self._watchdog.failure:
            self._progress.close()
            self._comm.Free()
            self._watchdog.leave(self._collectives, keeps_store=self._keeps_store)
            atexit.unregister(self._leave)
        elif not self._watchdog.error_reported:
            self._watchdog.error_reported = True
            raise RuntimeError(self._watchdog.failure)

    def abort(self) -> None:
        """Mark the group as failed; other ranks detect it when they wait for this one."""
        self._watchdog.fail("abort()", "was called")

    def _leave(self, pid: int) -> None:
        # At exit, for a group that was not destroyed. A forked child is no rank.
        if pid != os.getpid():
            return
        abort_after_error(pid)  # before any wait
        reported = self._watchdog.error_reported
        with suppress(RuntimeError):  # recorded by the watchdog
            self._progress.close()
        if self._watchdog.failure:
            if not reported:
                sys.stderr.write(f"{self._watchdog.failure}\n")
            abort_job()
        self._watchdog.leave(self._collectives, keeps_store=self._keeps_store)

    @property
    def _keeps_store(self) -> bool:
        # Rank 0 of the first group, which has this description, holds the store of all groups.
        return self._rank == 0 and self._description == "default_pg"

    @property
    def _timeout(self) -> timedelta:
        # The name in the options of torch's backends.
        return timedelta(seconds=self._watchdog.timeout)

    # torch.distributed requires the methods below from a process group in Python. Functional
    # collectives find a group by its name.

    @property
    def _device_types(self) -> list[torch.device]:
        gpus = [torch.device("cuda")] if torch.cuda.is_available() else []
        return [torch.device("cpu"), *gpus]

    def _get_backend(self, device: torch.device) -> GroupLifecycle:
        return self  # one transport for all devices

    def get_group_store(self) -> dist.Store:
        """Return the store of the group."""
        return self._store

    def getBackendName(self) -> str:  # noqa: N802
        """Return the name of the backend."""
        return BACKEND

    def getGroupName(self) -> str:  # noqa: N802
        """Return the unique name of the group."""
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        """Set the unique name of the group."""
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802
        """Return the description passed to ``new_group``."""
        return self._description

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        """Set the description passed to ``new_group``."""
        self._description = description


def _label(name: str, results: Sequence[Tensor], opts: Any) -> str:
    """Return the properties of a collective that must be equal on all ranks."""
    words = [name]
    if name in _EQUAL_SIZES:
        words.append(" and ".join(f"{result.numel()} {result.dtype}" for result in results))
    if hasattr(opts, "reduceOp"):
        words.append(opts.reduceOp.op.name)
    if hasattr(opts, "rootRank"):
        words.append(f"root {opts.rootRank}")
    return ", ".join(words)
