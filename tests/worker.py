"""One rank of a pool: runs the functions sent by the test process (see tests/ranks.py)."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

import syncbn
from tests import device
from tests.transports import backend_of


def main(transport: str, folder: str, timeout: str, impl: str) -> None:
    device.use_impl(impl)
    rank = _join(transport, folder, timedelta(seconds=float(timeout)))
    client = socket.socket(socket.AF_UNIX)
    client.connect(f"{folder}/socket")
    connection = Connection(client.detach())
    connection.send(rank)
    while _serve(rank, connection):
        pass
    dist.destroy_process_group()


def _join(transport: str, folder: str, timeout: timedelta) -> int:
    torch.set_num_threads(1)
    backend = backend_of(transport)
    if backend == "mpi4py":
        rank = syncbn.init_process_group(backend, timeout).rank
        poll_often()
        return rank
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return rank


def poll_often() -> None:
    """Make the watchdogs of MPI groups poll ten times as often, so that errors arrive sooner."""
    from syncbn.distributed.mpi import watchdog, work

    work._SECONDS_BEFORE_CHECK = watchdog._POLL_SECONDS = 0.1
    watchdog._REPORT_SECONDS = 0.5


def _serve(rank: int, connection: Connection) -> bool:
    try:
        function, args = pickle.loads(connection.recv_bytes())
    except EOFError:
        return False
    try:
        answer = (True, function(rank, *args))
    except Exception:
        answer = (False, traceback.format_exc())
    # Plain pickle: Connection.send would share tensors through files of this process.
    connection.send_bytes(pickle.dumps(answer))
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
