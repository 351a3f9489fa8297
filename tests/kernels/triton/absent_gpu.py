"""A driver of Triton for a GPU that is not here: kernels are compiled, and launches recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from syncbn.kernels.triton import launcher

# Shared memory per block, in bytes, of the GPUs with the least.
_SHARED_MEMORY = 101376


class Launch(NamedTuple):
    """Arguments of Triton's launcher.

    Attributes:
        kernel: name of the compiled kernel.
        grid: number of programs per dimension.
        device: index of the current device.
        arguments: all arguments of the kernel, constants too.
    """

    kernel: str
    grid: tuple[int, int, int]
    device: int | None
    arguments: tuple[Any, ...]


@contextmanager
def compile_for(architecture: int) -> Iterator[list[Launch]]:
    """Compile for an architecture (90: compute capability 9.0); return recorded launches.

    One architecture per process: Triton caches compiled kernels per device.
    """
    launches: list[Launch] = []

    def make_launcher(source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            arity = len(source.fn.arg_names)
            device = torch.cuda.current_device()
            launches.append(Launch(metadata.name, (x, y, z), device, rest[-arity:]))

        return launch

    stub = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        launcher_cls=make_launcher,
        utils=SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": _SHARED_MEMORY},
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            unload_module=lambda _: None,
        ),
    )
    pdl = {"PDL": architecture >= 90}
    pdl |= {"launch_pdl": True} if architecture >= 90 else {}
    before = driver._active
    driver.set_active(stub)
    try:
        with (
            patch.object(launcher, "_pdl_options", lambda _: pdl),
            patch.object(torch.cuda, "current_device", lambda: None),
        ):
            yield launches
    finally:
        driver._active = before
