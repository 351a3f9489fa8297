"""Virtual batches: statistics over a fixed number of samples, whatever the number of ranks.

The batches of all ranks, one after the other, are cut into virtual batches of ``size`` samples.
Each has separate statistics: over several ranks if a rank holds fewer samples, over a part of a
rank's batch if it holds more (ghost batch normalization: Hoffer, Hubara and Soudry, Train longer,
generalize better, 2017). So training on 1, 2, 4 and 8 ranks with the same global batch is the same
training.

A payload has a row per rank, whatever the batch size, so that ranks with different batches get an
error where payloads are checked (:mod:`syncbn.distributed.fingerprint`). A rank adds the moments of
its samples to the row of its virtual batch, or, if it holds several, sends their mean for the
running statistics. Process groups of several ranks would send less, but would have to be created
for each batch size, and the running statistics, which average over all virtual batches, would need
another all-reduce.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import modes
from syncbn.distributed import collectives, fingerprint
from syncbn.kernels.base import NormalizeArgs, Saved
from syncbn.kernels.reference import update_running_stats
from syncbn.moments import Moments, get_packed_size
from syncbn.ops import activation_checkpoint
from syncbn.ops.params import BatchNormParams, check_value_count, describe_all_reduce


class VirtualBatches(NamedTuple):
    """Virtual batches that a rank has samples of.

    Attributes:
        sizes: samples of this rank in each of them.
        is_shared: True if there is one, and other ranks have samples of it, too.
        row: row of this rank in a payload.
        ranks: rows of a payload.
        used: leading rows that belong to a virtual batch.
    """

    sizes: list[int]
    is_shared: bool
    row: int
    ranks: int
    used: int


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
        if samples < size:
            return VirtualBatches([samples], True, rank * samples // size, ranks, whole // size)
        return VirtualBatches([size] * (samples // size), False, rank, ranks, ranks)
    fitting = [n for n in range(1, 2 * max(samples, size) + 1) if _fits(n, size, ranks)]
    nearest = sorted(sorted(fitting, key=lambda n: abs(n - samples))[:2])
    raise ValueError(
        f"got {samples} samples per rank on {ranks} ranks with normalization_batch={size}; "
        f"expected samples that divide into virtual batches, such as {nearest} per rank (a "
        "DataLoader needs drop_last=True)"
    )


def report_indivisible(x: Tensor, params: BatchNormParams) -> None:
    """Take part in the all-reduce of ranks whose batch divides, so that they get an error, too."""
    if params.group is not None and x.is_cpu:
        size = params.group.size() * get_packed_size(x.shape[1], x.dtype)
        label = f"{params.label} forward, a batch of {len(x)} samples that does not divide"
        with suppress(RuntimeError):
            collectives.all_reduce(x.new_zeros(size, dtype=torch.float64), params.group, label)


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

    One all-reduce of ``[R, 2C + 1]`` for R ranks forward (``[R, 4C + 1]`` for float64 inputs), and
    one of ``[R, 2C]`` backward if they share virtual batches. The running statistics record the
    mean over the virtual batches of their means and unbiased variances, so they are equal on all
    ranks.
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
        sizes = batches.sizes
        moments = [params.kernel.moments(part) for part in x.split(sizes)]
        rows, is_new = _reduce_moments(moments, x, params, batches)
        if is_new:
            _record(rows[: batches.used], x.shape[1], params)
        if batches.is_shared:
            moments = [rows[batches.row]]
        check_value_count(x, moments[0][-1], params)
        args = NormalizeArgs(params.eps, weight, bias, params.activation)
        residuals = [None] * len(sizes) if residual is None else residual.split(sizes)
        parts = zip(x.split(sizes), moments, residuals, strict=True)
        results = [params.kernel.normalize(part, m, args, r) for part, m, r in parts]
        ctx.save_for_backward(*[tensor for _, saved in results for tensor in saved.tensors()])
        ctx.constants = [saved.constants() for _, saved in results]
        number = fingerprint.count_checked(params.group)
        ctx.params, ctx.batches = params._replace(call_number=number), batches
        return _join([y for y, _ in results])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, this rank's dweight and dbias, and dresidual."""
        params: BatchNormParams = ctx.params
        batches: VirtualBatches = ctx.batches
        tensors, mask = ctx.saved_tensors, ctx.needs_input_grad[:4]
        saved = [Saved(*tensors[5 * i : 5 * i + 5], *c) for i, c in enumerate(ctx.constants)]
        if not torch.compiler.is_compiling():
            is_transformed = modes.in_functorch_transform() or modes.in_forward_ad()
            if torch.is_grad_enabled() or is_transformed or modes.is_grads_batched(dy):
                raise first_derivatives_only(params.label)
        reduced = [
            params.kernel.backward_reduce(part, values, mask)
            for part, values in zip(dy.split(batches.sizes), saved, strict=True)
        ]
        sums = [part.sums for part in reduced]
        if batches.is_shared:
            label = _describe("backward", saved[0].x, params, batches)
            sums = [_all_reduce_rows(sums[0], params, batches, label)[batches.row]]
        dx = None
        if mask[0]:
            results = zip(saved, reduced, sums, strict=True)
            dx = _join([params.kernel.backward_elemt(*arguments) for arguments in results])
        # Sums of all virtual batches of this rank.
        dweight = _sum([part.dweight for part in reduced]) if mask[1] else None
        dbias = _sum([part.dbias for part in reduced]) if mask[2] else None
        dresidual = _join([part.dresidual for part in reduced]) if mask[3] else None
        return dx, dweight, dbias, dresidual, None, None


def _reduce_moments(
    moments: list[Tensor], x: Tensor, params: BatchNormParams, batches: VirtualBatches
) -> tuple[Tensor, bool]:
    """Return the all-reduced rows of moments, and whether they are new."""

    def compute() -> Tensor:
        own = _average(moments, x.shape[1]).pack() if len(moments) > 1 else moments[0]
        label = _describe("forward", x, params, batches)
        return _all_reduce_rows(own, params, batches, label)

    phase = None if torch.compiler.is_compiling() else activation_checkpoint.current()
    if phase is None:
        return compute(), True
    with modes.bypass_modes(x):
        return phase.moments_for(compute, x, params.label)


def _all_reduce_rows(
    own: Tensor, params: BatchNormParams, batches: VirtualBatches, label: str
) -> Tensor:
    """Return a row per rank: the sum of the values that ranks add to it."""
    rows = own.new_zeros(batches.ranks, len(own))
    rows[batches.row] = own
    return collectives.all_reduce(rows.flatten(), params.group, label).view(rows.shape)


def _describe(direction: str, x: Tensor, params: BatchNormParams, batches: VirtualBatches) -> str:
    label = describe_all_reduce(params, direction, x)
    return f"{label}, {sum(batches.sizes)} samples per rank" if label else ""


def _average(moments: list[Tensor], channels: int) -> Moments:
    """Return moments with the mean of the means and of the variances."""
    unpacked = [Moments.unpack(part, channels) for part in moments]
    pairs = [part.mean_and_m2() for part in unpacked]
    mean, m2 = (torch.stack(values).mean(0) for values in zip(*pairs, strict=True))
    count = torch.stack([part.count for part in unpacked]).mean()
    two_parts = unpacked[0].sum_low is not None
    return Moments.from_pivot(count, mean, torch.zeros_like(mean), m2, two_parts)


def _join(parts: list[Any]) -> Tensor:
    joined: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined


def _sum(parts: list[Any]) -> Tensor:
    return torch.stack(parts).sum(0)


def _record(rows: Tensor, channels: int, params: BatchNormParams) -> None:
    """Update the running statistics with the mean over the virtual batches."""
    if params.running is not None:
        update_running_stats(_average(list(rows.unbind()), channels), params.running)
