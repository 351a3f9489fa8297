"""The ranks of a benchmark that any launcher may have started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch
import torch.distributed as dist

from syncbn.distributed.environment import init_process_group
from syncbn.distributed.launchers import detect_launcher


@dataclass(frozen=True)
class World:
    """All ranks, and this one.

    Attributes:
        rank: of this process.
        size: number of ranks.
        device: of this rank.
        meet: ranks wait for each other here.
        facts: about them, by name.
    """

    rank: int
    size: int
    device: torch.device
    meet: Callable[[], None]
    facts: dict[str, str]


def is_gpu(device: str | None) -> bool:
    """Return whether a benchmark runs on a GPU.

    Args:
        device: "cpu", "cuda", or None for what there is.

    Raises:
        ValueError: there is no GPU, and one is asked for.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda; expected cpu, since torch sees no GPU here")
    return device == "cuda" or (device is None and torch.cuda.is_available())


def begin(device: str | None) -> World:
    """Initialize torch.distributed for what started this process.

    Args:
        device: as for :func:`is_gpu`.

    Raises:
        ValueError: there is no GPU, and one is asked for.
    """
    on_gpu = is_gpu(device)
    place = init_process_group()
    backend = dist.get_backend()
    facts = {"ranks": f"{place.world_size}, {backend}, started by: {detect_launcher(os.environ)}"}
    on = place.device if on_gpu else torch.device("cpu")
    if on.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(on)
        facts["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        facts["driver"] = _driver()
        facts["Triton"] = version("triton") if find_spec("triton") else "not installed"
    return World(place.rank, place.world_size, on, _meeting(place.world_size, backend), facts)


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not say: {error}"
    return found.stdout.splitlines()[0]


def _meeting(size: int, backend: str) -> Callable[[], None]:
    if size == 1:
        return lambda: None
    if backend == "mpi4py":
        from syncbn.bench.mpirun import meeting

        return meeting()
    return dist.barrier
