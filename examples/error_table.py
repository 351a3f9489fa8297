"""Error of the layer against one float64 process on the whole batch, per dtype and layout.

    NPROC=3 launch/torchrun.sh examples/error_table.py
    NPROC=3 launch/mpirun.sh examples/error_table.py

Prints the largest relative error over all ranks (the largest error over the largest value) of the
output, the input gradient, the parameter gradients and the running statistics. A second table
compares float64 inputs with torch.nn.BatchNorm2d on the whole batch in one process.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from oracle import EPS, MOMENTUM, Case, Result, batch, expected, parameters, relative_errors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last")
OFFSETS, FLOAT64_OFFSETS = (0.0, 100.0, 1e4), (0.0, 1e4, 1e6)
QUANTITIES = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")
CHANNELS = 33
IMAGE = (56, 56)


def splits(world_size: int) -> dict[str, list[int]]:
    """Return the samples on each rank: equal, uneven, and with an empty rank."""
    return {
        "equal": [4] * world_size,
        "uneven": [1 + 3 * rank for rank in range(world_size)],
        "one rank empty": [0] + [4] * (world_size - 1),
    }


def observe(case: Case, rank: int, device: torch.device, kernel: str = "auto") -> Result:
    """Run the layer forward and backward on this rank's part of a case."""
    layer = syncbn.SyncBatchNorm(
        case.channels, eps=EPS, momentum=MOMENTUM, affine=case.affine, dtype=case.parameter_dtype
    ).to(device)
    layer.impl = kernel
    x, dy = (t.to(device) for t in batch(case, rank))
    return step(layer, case, x, dy)


def observe_torch(case: Case) -> Result:
    """Run torch.nn.BatchNorm2d forward and backward on the batches of all ranks."""
    dtype = case.parameter_dtype
    layer = nn.BatchNorm2d(case.channels, EPS, MOMENTUM, case.affine, dtype=dtype)
    x, dy = map(torch.cat, zip(*(batch(case, r) for r in range(len(case.shapes))), strict=True))
    return step(layer, case, x, dy)


def step(layer: _BatchNorm, case: Case, x: Tensor, dy: Tensor) -> Result:
    """Run a layer forward and backward, with the weight and bias of a case."""
    x.requires_grad_()
    with torch.no_grad():
        for parameter, value in zip((layer.weight, layer.bias), parameters(case), strict=True):
            if value is not None:
                parameter.copy_(value)
    y = layer(x)
    y.backward(dy)
    found: dict[str, Tensor | None] = {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": layer.weight.grad if case.affine else None,
        "dbias": layer.bias.grad if case.affine else None,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }
    return {name: value.cpu() for name, value in found.items() if value is not None}


def row(case: Case, info: syncbn.RankInfo) -> list[float]:
    """Return the largest error over all ranks of each quantity."""
    errors = relative_errors(observe(case, info.rank, info.device), expected(case)[info.rank])
    largest = torch.tensor([errors[name] for name in QUANTITIES], device=info.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def torch_row(case: Case) -> list[float]:
    """Return the errors of torch.nn.BatchNorm2d."""
    parts = expected(case)
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("y", "dx")}
    for name in ("dweight", "dbias"):
        whole[name] = torch.stack([part[name] for part in parts]).sum(0)
    errors = relative_errors(observe_torch(case), parts[0] | whole)
    return [errors[name] for name in QUANTITIES]


def head(first: str) -> list[str]:
    """Return the first lines of a Markdown table."""
    return [
        f"| {first} | layout | ranks | mean/std | " + " | ".join(QUANTITIES) + " |",
        "|---|---|---|---|" + "---|" * len(QUANTITIES),
    ]


def line(first: str, case: Case, split: str, errors: list[float]) -> str:
    """Return a line of a Markdown table."""
    cells = " | ".join(f"{error:.1e}" for error in errors)
    return f"| {first} | {case.layout} | {split} | {case.offset:g} | {cells} |"


def float64_table(info: syncbn.RankInfo) -> list[str]:
    """Return the Markdown table of float64 inputs, computed by all ranks together."""
    lines = head("float64")
    corners = itertools.product(splits(info.world_size).items(), FLOAT64_OFFSETS)
    for (split, sizes), offset in corners:
        shapes = tuple((size, CHANNELS, *IMAGE) for size in sizes)
        case = Case(shapes, torch.float64, "contiguous", offset)
        lines.append(line("SyncBatchNorm", case, split, row(case, info)))
        lines.append(line("nn.BatchNorm2d", case, split, torch_row(case)))
    return lines


def table(info: syncbn.RankInfo) -> list[str]:
    """Return the Markdown table, computed by all ranks together."""
    lines = head("dtype")
    corners = itertools.product(DTYPES, LAYOUTS, splits(info.world_size).items(), OFFSETS)
    for dtype, layout, (split, sizes), offset in corners:
        shapes = tuple((size, CHANNELS, *IMAGE) for size in sizes)
        case = Case(shapes, dtype, layout, offset)
        lines.append(line(str(dtype)[6:], case, split, row(case, info)))
    return lines


def main() -> None:
    """Compute the table on all ranks; rank 0 prints it."""
    info = syncbn.init_process_group()
    lines = [*table(info), "", *float64_table(info)]
    if info.rank == 0:
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
