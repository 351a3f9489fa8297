"""Virtual batches: statistics over a fixed number of samples, whatever the number of ranks.

The batches of all ranks, one after the other, are cut into virtual batches of ``size`` samples.
Each has statistics of its own: of several ranks if a rank holds fewer samples, of a part of a rank
if it holds more (ghost batch normalization: Hoffer, Hubara and Soudry, Train longer, generalize
better, 2017). So training on 1, 2, 4 and 8 ranks with the same global batch is the same training.

A payload has a row per virtual batch of the whole group, and a rank adds to its own rows. Process
groups of several ranks would send less, but would have to be created for each batch size, and
running statistics, which average over all virtual batches, would need another all-reduce.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import modes
from syncbn.distributed import collectives
from syncbn.kernels.base import Kernel, NormalizeArgs, Saved
from syncbn.kernels.reference import update_running_stats
from syncbn.moments import Moments
from syncbn.ops import activation_checkpoint
from syncbn.ops.params import BatchNormParams, describe_all_reduce


class VirtualBatches(NamedTuple):
    """Virtual batches of a group, and those that this rank has samples of.

    Attributes:
        total: number of virtual batches of the whole group.
        first: index of the first one of this rank.
        sizes: samples of this rank in each of its virtual batches, from ``first`` on.
    """

    total: int
    first: int
    sizes: list[int]


def divide_batch(samples: int, size: int, group: dist.ProcessGroup | None) -> VirtualBatches:
    """Return the virtual batches of a group whose ranks hold equally many samples.

    Args:
        samples: samples of this rank, and of every other rank.
        size: samples of a virtual batch.
        group: process group, or None for this process alone.

    Raises:
        ValueError: the samples cannot be divided; the message gives the nearest numbers that can.
    """
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    whole = samples * ranks
    if samples and whole % size == 0 and (samples % size == 0 or size % samples == 0):
        share = min(samples, size)
        return VirtualBatches(whole // size, rank * samples // size, [share] * (samples // share))
    fitting = [n for n in range(1, 2 * max(samples, size) + 1) if _fits(n, size, ranks)]
    nearest = sorted(sorted(fitting, key=lambda n: abs(n - samples))[:2])
    raise ValueError(
        f"got {samples} samples per rank on {ranks} ranks with normalization_batch={size}; "
        f"expected samples that divide into virtual batches, such as {nearest} per rank (a "
        "DataLoader needs drop_last=True)"
    )


def _fits(samples: int, size: int, ranks: int) -> bool:
    divides = samples % size == 0 or size % samples == 0
    return divides and samples * ranks % size == 0


def first_derivatives_only(label: str) -> RuntimeError:
    """Return the error for ``create_graph=True`` and transforms."""
    return RuntimeError(
        f"{label}: got create_graph=True, forward-mode differentiation or a transform of "
        "torch.func; layers with normalization_batch have only first derivatives of backward()"
    )


class VirtualBatchNormFunction(torch.autograd.Function):
    """:class:`.function.SyncBatchNormFunction` for each virtual batch, with the same formulas.

    One all-reduce of ``[total, 2C + 1]`` forward and one of ``[total, 2C]`` backward. The running
    statistics record the mean over the virtual batches of their means and unbiased variances, so
    they are equal on all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        params: BatchNormParams,
        batches: VirtualBatches,
    ) -> Tensor:
        """Return y; update the running statistics."""
        rows, is_new = _reduce_moments(params.kernel, x, params, batches)
        if is_new:
            _record(rows, x.shape[1], params)
        args = NormalizeArgs(params.eps, weight, bias, params.activation)
        results = [
            params.kernel.normalize(part, row, args, added)
            for part, added, row in _parts(x, residual, rows, batches)
        ]
        ctx.save_for_backward(*[tensor for _, saved in results for tensor in saved[:5]])
        ctx.constants = [saved[5:] for _, saved in results]
        ctx.params, ctx.batches = params, batches
        return _join([y for y, _ in results])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, this rank's dweight and dbias, and dresidual."""
        params: BatchNormParams = ctx.params
        batches: VirtualBatches = ctx.batches
        tensors, mask = ctx.saved_tensors, ctx.needs_input_grad[:4]
        saved = [Saved(*tensors[5 * i : 5 * i + 5], *c) for i, c in enumerate(ctx.constants)]
        if not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or modes.is_grads_batched(dy)
        ):
            raise first_derivatives_only(params.label)
        reduced = [
            params.kernel.backward_reduce(part, values, mask)
            for part, values in zip(dy.split(batches.sizes), saved, strict=True)
        ]
        label = describe_all_reduce(params, "backward", saved[0].x)
        sums = _all_reduce_rows([part.sums for part in reduced], params, batches, label)
        dx = None
        if mask[0]:
            own = sums[batches.first :]
            results = zip(saved, reduced, own[: len(reduced)], strict=True)
            dx = _join([params.kernel.backward_elemt(*arguments) for arguments in results])
        # Sums of all virtual batches of this rank.
        dweight = _sum([part.dweight for part in reduced]) if mask[1] else None
        dbias = _sum([part.dbias for part in reduced]) if mask[2] else None
        dresidual = _join([part.dresidual for part in reduced]) if mask[3] else None
        return dx, dweight, dbias, dresidual, None, None


def _reduce_moments(
    kernel: Kernel, x: Tensor, params: BatchNormParams, batches: VirtualBatches
) -> tuple[Tensor, bool]:
    """Return the moments of all virtual batches, and whether they are new."""

    def compute() -> Tensor:
        parts = [kernel.moments(part) for part in x.split(batches.sizes)]
        label = describe_all_reduce(params, "forward", x)
        return _all_reduce_rows(parts, params, batches, label)

    phase = None if torch.compiler.is_compiling() else activation_checkpoint.current()
    return (compute(), True) if phase is None else phase.moments_for(compute, x, params.label)


def _all_reduce_rows(
    parts: list[Tensor], params: BatchNormParams, batches: VirtualBatches, label: str
) -> Tensor:
    """Return a row per virtual batch of the group: the sum of the ranks' parts of it."""
    own = torch.stack(parts)
    after = batches.total - batches.first - len(parts)
    rows = torch.nn.functional.pad(own, (0, 0, batches.first, after))
    label = f"{label}, virtual batches of {batches.sizes[0]} samples here" if label else ""
    return collectives.all_reduce(rows.flatten(), params.group, label).view(rows.shape)


def _parts(
    x: Tensor, residual: Tensor | None, rows: Tensor, batches: VirtualBatches
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Return input, residual and moments of each virtual batch of this rank."""
    sizes = batches.sizes
    residuals = [None] * len(sizes) if residual is None else residual.split(sizes)
    own = rows[batches.first : batches.first + len(sizes)]
    return list(zip(x.split(sizes), residuals, own, strict=True))


def _join(parts: list[Any]) -> Tensor:
    joined: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined


def _sum(parts: list[Any]) -> Tensor:
    return torch.stack(parts).sum(0)


def _record(rows: Tensor, channels: int, params: BatchNormParams) -> None:
    """Update the running statistics with the means over the virtual batches."""
    if params.running is None:
        return
    moments = [Moments.unpack(row, channels) for row in rows]
    pairs = [part.mean_and_m2() for part in moments]
    mean, m2 = (torch.stack(values).mean(0) for values in zip(*pairs, strict=True))
    count = torch.stack([part.count for part in moments]).mean()
    update_running_stats(
        Moments.from_pivot(count, mean, torch.zeros_like(mean), m2, two_parts=True), params.running
    )
