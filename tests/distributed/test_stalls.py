"""Ranks that stop or never arrive: the warning, and the ranks in the error."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import warnings
from datetime import timedelta

import pytest
import torch

import syncbn
from syncbn.distributed import stalls
from syncbn.distributed.groups import active_group
from tests.ranks import COLLECTIVE_TIMEOUT, Pool

STOPPED_SECONDS = 5.0
LABEL = "SyncBatchNorm1d(2) forward, torch.float32 input"


def _run_while_rank_1_is_stopped(rank: int) -> list[str]:
    patience, stalls._WARN_SECONDS = stalls._WARN_SECONDS, 2.0
    layer = syncbn.SyncBatchNorm1d(2)
    layer(torch.randn(3, 2))
    if rank == 1:
        resume = f"sleep {STOPPED_SECONDS}; kill -CONT {os.getpid()}"
        resumer = subprocess.Popen(["sh", "-c", resume])
        os.kill(os.getpid(), signal.SIGSTOP)
        resumer.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(torch.randn(3, 2))
    stalls._WARN_SECONDS = patience
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("transport", ["gloo", "openmpi"])
def test_stopped_rank_is_named_once_in_a_warning(pool: Pool, transport: str) -> None:
    first, *others = pool(3, transport).run(_run_while_rank_1_is_stopped)
    assert others == [[], []]
    (message,) = first
    call, reason = message.split(": ")
    assert call.startswith(f"{LABEL}, all-reduce ")
    assert reason == "no result after 2 s; rank 1 has not reached it"


def _skip_layer(rank: int) -> str:
    layers = [syncbn.SyncBatchNorm1d(2) for _ in range(2)]
    group = active_group(None)
    assert group is not None
    group.set_timeout(timedelta(seconds=3))
    layers[0](torch.randn(3, 2))
    message = ""
    if rank > 0:
        with pytest.raises(RuntimeError) as caught:
            layers[1](torch.randn(3, 2))
        message = str(caught.value)
    else:
        time.sleep(5)
    group.set_timeout(timedelta(seconds=COLLECTIVE_TIMEOUT))
    return message


def test_absent_rank_is_named_in_the_error_over_gloo(pool: Pool) -> None:
    ranks = pool(3, "gloo")
    _, *messages = ranks.run(_skip_layer)
    ranks.close()  # Gloo's group does not work after a timeout
    for rank, message in enumerate(messages, start=1):
        assert f"failed on rank {rank} of 3; rank 0 has not reached it. If" in message
