"""Two ranks as forks of the test process, which has imported the trainers already.

A trainer takes 10 seconds to import and keeps the state of its run in the process.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZE = 2
_SECONDS = 40


def run_on_two_ranks(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Return ``function(rank, *args)`` of two ranks in a Gloo group, started as by torchrun."""
    context = get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(SIZE)]
    processes = [
        context.Process(target=_serve, args=(rank, folder, pipes[rank][1], function, args))
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    try:
        answers = [_receive(reader, rank) for rank, (reader, _) in enumerate(pipes)]
    finally:
        for process in processes:
            process.terminate()
            process.join()
    failed = [text for good, text in answers if not good]
    assert not failed, "\n".join(failed)
    return [value for _, value in answers]


def _receive(reader: Connection, rank: int) -> tuple[bool, Any]:
    if not reader.poll(_SECONDS):
        return False, f"rank {rank}: no answer in {_SECONDS} s"
    answer: tuple[bool, Any] = pickle.loads(reader.recv_bytes())
    return answer


def _serve(
    rank: int, folder: Path, writer: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= _torchrun_variables(rank)
    timeout = timedelta(seconds=_SECONDS / 2)
    store = dist.FileStore(str(folder / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timeout)
    try:
        answer: tuple[bool, Any] = True, function(rank, *args)
    except BaseException:
        answer = False, f"rank {rank}: {traceback.format_exc()}"
    # Plain pickle: Connection.send would share tensors through files of this process.
    writer.send_bytes(pickle.dumps(answer))
    sys.stdout.flush()


def _torchrun_variables(rank: int) -> dict[str, str]:
    size = str(SIZE)
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "test"},
    }
