"""Compare what the node launches with what Python does, on a driver that launches nothing.

``python -m tests.triton_node`` prints as JSON whether that is told the same of a layer's step:
kernels, programs, threads, shared memory and arguments, but for where new tensors are.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from syncbn.autograd import node
from syncbn.kernels import triton
from syncbn.kernels.triton_launch import Launch
from tests.node import STEP, layer, step
from tests.triton_launches import Recorder, active, build

# More than any size or count, and less than an address.
LARGE = 2**40


def is_told_the_same(recorder: Recorder, x: Tensor, residual: bool) -> bool:
    """Return whether the driver is told the same by the node."""
    made = layer(x.shape[1], activation="relu")
    given = x.requires_grad_(), torch.randn_like(x), *([torch.randn_like(x)] if residual else [])

    def told() -> list[list[Any]]:
        found = recorder.told(lambda: step(made, *given))
        return [[n if isinstance(n, bytes) or n < LARGE else "address" for n in k] for k in found]

    with patch.object(node, "_plans", lambda _: None):
        # This also says how many bytes arguments have.
        assert recorder.is_told_the_same(lambda: step(made, *given))
        wanted = told()
    for _ in range(2):
        step(made, *given)
    with patch.object(Launch, "__call__", side_effect=AssertionError):
        found = told()
    assert [launch[0].decode() for launch in found] == STEP
    return found == wanted


def others_go_on(recorder: Recorder, x: Tensor) -> bool:
    """Return whether Python's other threads do, while CUDA's queue is full."""
    made, seconds = layer(x.shape[1]), []
    with torch.no_grad():
        for _ in range(2):
            made(x)
        # Each of the two launches takes a second.
        recorder.number("delay").value = 10**6
        launching = Thread(target=made, args=(x,))
        launching.start()
        while launching.is_alive():
            time.sleep(0.05)
            seconds.append(time.perf_counter())
        recorder.number("delay").value = 0
    return len(seconds) > 10


def main() -> None:
    """Compare, for vectors and where programs share channels, with a residual and without."""
    inputs = {
        "vectors": torch.randn(16, 64, 14, 14),
        "channels_last": torch.randn(16, 64, 14, 14).to(memory_format=torch.channels_last),
        "shared channels": torch.randn(64, 4, 32, 32),
        "bfloat16": torch.randn(16, 64, 14, 14, dtype=torch.bfloat16),
    }
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(build(Path(folder)))
        with active(7), patch.object(triton, "_why_none", lambda *_: None):
            found = {
                f"{name}, {residual=}": is_told_the_same(recorder, x, residual)
                for name, x in inputs.items()
                for residual in (False, True)
            }
            found["others go on"] = others_go_on(recorder, inputs["vectors"].detach())
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
