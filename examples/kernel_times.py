"""How long each CPU kernel takes, in units of copying the tensor, beside nn.BatchNorm2d.

    OMP_NUM_THREADS=1 python examples/kernel_times.py [float32|bfloat16]

One process and no communication: forward and backward on the eight tensors that dominate a
ResNet-50 at batch 16. Medians of interleaved runs, so that a busy machine disturbs all columns
alike.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import syncbn

SHAPES = (
    (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7),
)  # fmt: skip
KERNELS = ("aten_cpu", "blocked", "reference")
SAMPLES = 16
REPEATS = 11


def layers(channels: int) -> dict[str, nn.Module]:
    """Return the layers to compare, by the name of their column."""
    found: dict[str, nn.Module] = {"nn.BatchNorm2d": nn.BatchNorm2d(channels)}
    for kernel in KERNELS:
        found[kernel] = layer = syncbn.SyncBatchNorm2d(channels)
        layer.sync_kernel = kernel
    return found


def training_step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """Return forward and backward of a layer as something to call."""
    x = x.detach().requires_grad_()
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, dy)


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each call, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def row(channels: int, size: int, memory_format: torch.memory_format, dtype: torch.dtype) -> str:
    """Return one line of the table."""
    shape = (SAMPLES, channels, size, size)
    x, dy = (torch.randn(shape).to(dtype, memory_format=memory_format) for _ in range(2))
    target = torch.empty_like(x)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(x)}
    calls |= {name: training_step(layer, x, dy) for name, layer in layers(channels).items()}
    seconds = medians(calls)
    copy = seconds.pop("copy")
    layout = "NHWC" if memory_format == torch.channels_last else "NCHW"
    cells = [f"{value / copy:.1f}" for value in seconds.values()]
    ratio = f"{seconds['aten_cpu'] / seconds['nn.BatchNorm2d']:.2f}"
    columns = [f"{channels}x{size}x{size}", layout, f"{copy * 1e3:.2f}", *cells, ratio]
    return f"| {' | '.join(columns)} |"


def main() -> None:
    """Print a Markdown table."""
    dtype = getattr(torch, sys.argv[1] if len(sys.argv) > 1 else "float32")
    print(f"{dtype}, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n")
    print(f"| shape | layout | copy, ms | {' | '.join(layers(1))} | aten_cpu / nn.BatchNorm2d |")
    print("|" + "---|" * 8)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for channels, size in SHAPES:
            print(row(channels, size, memory_format, dtype), flush=True)


if __name__ == "__main__":
    main()
