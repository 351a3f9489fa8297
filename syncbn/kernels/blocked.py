"""The kernels as plain torch calls over cache-sized blocks: precise for any values, on CPU.

A whole-tensor call reads and writes main memory once each, and a freshly allocated temporary costs
page faults on top. Here every step of the formula runs on a block small enough to stay in cache, so
that each kernel reads its inputs from memory about once. :mod:`syncbn.kernels.aten_cpu` is faster
and hands over to these functions where it would not be precise.

A tensor is seen as a matrix whose *lanes* are reduced: rows of a contiguous ``[N, C, *]`` tensor
(lane = one channel of one sample), or columns when channels are innermost (lane = channel). The
four functions are those of :mod:`syncbn.kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.kernels.coefficients import (
    backward_coefficients,
    compute_dtype,
    normalize_coefficients,
    split_mean,
)

# Elements a block and a thread: with its scratch, 1 MB in float32, inside a core's L2 cache.
BLOCK = 1 << 17
# Longest run summed in float32 before float64 takes over: keeps sums of any length to 1e-6.
RUN = 1 << 14


class Block(NamedTuple):
    """One step of the iteration.

    Attributes:
        part: which partial sum of its lanes this block is.
        lanes: the lanes it covers.
        where: the block in the matrix.
        length: values per lane.
    """

    part: int
    lanes: slice
    where: tuple[slice, slice]
    length: int


class Layout(NamedTuple):
    """How ``[N, C, *]`` is seen as a matrix.

    Attributes:
        batch: N.
        channels: C.
        by_row: True if a lane is a row ``(n, c)``, False if it is a column ``c``.
        shape: of the matrix: ``(N * C, S)`` by row, ``(N * S, C)`` by column.
    """

    batch: int
    channels: int
    by_row: bool
    shape: tuple[int, int]

    @staticmethod
    def of(x: Tensor) -> Layout:
        """Choose the matrix for x: columns where channels are innermost in memory."""
        batch, channels = x.shape[:2]
        space = x.shape[2:].numel()
        by_row = space > 1 and x.is_contiguous()
        shape = (batch * channels, space) if by_row else (batch * space, channels)
        return Layout(batch, channels, by_row, shape)

    def matrix(self, t: Tensor) -> Tensor:
        """View t, of x's shape and laid out like x, as the matrix."""
        return (t if self.by_row else t.movedim(1, -1)).view(self.shape)

    def image(self, t: Tensor) -> Tensor:
        """View t as ``[N, C, H, W]``, contiguous or channels_last: what ATen's kernels expect."""
        if self.by_row:
            return t.view(self.batch, self.channels, self.shape[1], 1)
        return self.matrix(t).view(1, self.shape[0], 1, self.channels).permute(0, 3, 1, 2)

    def first_mean(self, x: Tensor) -> Tensor:
        """Return the mean by channel of the first sample, or of as many values of a column."""
        dtype = compute_dtype(x.dtype)
        if self.by_row:
            return x[0].flatten(1).mean(1, dtype=dtype)
        return self.matrix(x)[: -(-self.shape[0] // max(self.batch, 1))].mean(0, dtype=dtype)

    def spread(self, v: Tensor) -> Tensor:
        """Repeat ``[C]`` numbers so that they broadcast against the matrix."""
        return v.repeat(self.batch).unsqueeze(1) if self.by_row else v.unsqueeze(0)

    def fold(self, partial: Tensor) -> Tensor:
        """Sum partial sums, shape ``[parts, lanes]``, to float64 ``[C]``."""
        return partial.double().view(-1, self.channels).sum(0)

    def partial(self, dtype: torch.dtype, number: int) -> Tensor:
        """Return room for ``number`` kinds of partial sums, each ``[parts, lanes]``."""
        rows, columns = self.shape
        parts = -(-columns // RUN) if self.by_row else -(-rows // self._rows_a_block())
        return torch.empty(number, parts, rows if self.by_row else columns, dtype=dtype)

    def blocks(self) -> Iterator[Block]:
        """Cover the matrix in memory order."""
        rows, columns = self.shape
        height = self._rows_a_block()
        if not self.by_row:
            for part, i in enumerate(range(0, rows, height)):
                where = (slice(i, i + height), slice(None))
                yield Block(part, slice(None), where, min(height, rows - i))
            return
        for i in range(0, rows, height):
            lanes = slice(i, i + height)
            for part, j in enumerate(range(0, columns, RUN)):
                yield Block(part, lanes, (lanes, slice(j, j + RUN)), min(RUN, columns - j))

    def _rows_a_block(self) -> int:
        width = min(self.shape[1], RUN) if self.by_row else self.shape[1]
        height = max(1, BLOCK * torch.get_num_threads() // width)
        return height if self.by_row else min(height, RUN)


def moments(x: Tensor) -> Tensor:
    """See :func:`syncbn.kernels.reference.moments`.

    Each lane of a block is summed around the mean p of its first quarter, which takes a quarter of
    the time of its mean and is as good: if p is the mean of a fraction f of some values, then
    (p - mean)^2 <= var (1 - f)/f, so squares around p are at most 1/f = 4 times those around the
    mean. A single value as the pivot has no such bound; the first one may be padding.
    """
    count = x.numel() // x.shape[1]
    if count == 0:
        return torch.zeros(2 * x.shape[1] + 1, dtype=torch.float64)
    x = dense(x)
    layout = Layout.of(x)
    matrix, dim = layout.matrix(x), int(layout.by_row)
    dtype = compute_dtype(x.dtype)
    pivots, sums, squares = partial = layout.partial(dtype, 3)
    lengths = torch.empty(partial.shape[1], 1, dtype=torch.float64)
    for block in layout.blocks():
        lengths[block.part] = block.length
        values = matrix[block.where].to(dtype)
        quarter = values.narrow(dim, 0, -(-block.length // 4))
        pivot = torch.mean(quarter, dim, out=pivots[block.part, block.lanes])
        centred = values - pivot.unsqueeze(dim)
        torch.sum(centred, dim, out=sums[block.part, block.lanes])
        _sum_of_squares(centred, dim, out=squares[block.part, block.lanes])
    pivot, rest = pivots.double(), sums.double()
    total = rest + lengths * pivot
    total_sq = squares.double() + pivot * (rest + total)
    message = [layout.fold(total), layout.fold(total_sq)]
    return torch.cat([*message, torch.full((1,), count, dtype=torch.float64)])


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """See :func:`syncbn.kernels.reference.normalize`."""
    x = dense(x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    layout = Layout.of(x)
    source, target = layout.matrix(x), layout.matrix(y)
    coefficients = normalize_coefficients(mean, invstd, weight, bias, x.dtype)
    pivots, scales, shifts = (layout.spread(v) for v in coefficients)
    in_place = y.dtype == pivots.dtype
    for block in layout.blocks():
        out = target[block.where]
        pivot, scale, shift = (at(v, block) for v in (pivots, scales, shifts))
        values = torch.sub(source[block.where], pivot, out=out if in_place else None)
        values.mul_(scale).add_(shift)
        if not in_place:
            out.copy_(values)
    return y


def backward_reduce(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """See :func:`syncbn.kernels.reference.backward_reduce`."""
    if x.numel() == 0:
        return torch.zeros(2 * x.shape[1], dtype=torch.float64)
    x, dy = dense_pair(x, dy)
    layout = Layout.of(x)
    values, gradients, dim = layout.matrix(x), layout.matrix(dy), int(layout.by_row)
    pivot, rest = split_mean(mean, x.dtype)
    pivots = layout.spread(pivot)
    sums_dy, sums_dy_x = layout.partial(pivot.dtype, 2)
    for block in layout.blocks():
        gradient = gradients[block.where].to(pivot.dtype)
        torch.sum(gradient, dim, out=sums_dy[block.part, block.lanes])
        product = torch.sub(values[block.where], at(pivots, block)).mul_(gradient)
        torch.sum(product, dim, out=sums_dy_x[block.part, block.lanes])
    sum_dy, sum_dy_x = layout.fold(sums_dy), layout.fold(sums_dy_x)
    return torch.cat([sum_dy, (sum_dy_x - rest * sum_dy) * invstd])


def backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    count: Tensor,
) -> Tensor:
    """See :func:`syncbn.kernels.reference.backward_elemt`."""
    x, dy = dense_pair(x, dy)
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    layout = Layout.of(x)
    values, gradients, target = (layout.matrix(t) for t in (x, dy, dx))
    coefficients = backward_coefficients(mean, invstd, weight, sums, count, x.dtype)
    spread = [layout.spread(v) for v in coefficients]
    in_place = dx.dtype == coefficients.pivot.dtype
    for block in layout.blocks():
        out = target[block.where]
        pivot, slope, offset, scale = (at(v, block) for v in spread)
        projection = torch.sub(values[block.where], pivot).mul_(slope)
        result = torch.sub(gradients[block.where], offset, out=out if in_place else None)
        result.sub_(projection).mul_(scale)
        if not in_place:
            out.copy_(result)
    return dx


def _sum_of_squares(values: Tensor, dim: int, out: Tensor) -> None:
    """Overwrites the values. The norm is the faster along rows, and much the slower across them."""
    if dim == 1:
        torch.linalg.vector_norm(values, dim=1, out=out).square_()
    else:
        torch.sum(values.square_(), dim, out=out)


def at(v: Tensor, block: Block) -> Tensor:
    """Return a block's part of the per-channel numbers of :meth:`Layout.spread`."""
    return v[block.lanes] if v.shape[1] == 1 else v


def dense(x: Tensor) -> Tensor:
    """Return x itself if it is contiguous or channels_last, else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def dense_pair(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return x dense and dy in x's layout; gradients come expanded or in another layout."""
    x = dense(x)
    if dy.is_contiguous() if x.is_contiguous() else dy.movedim(1, -1).is_contiguous():
        return x, dy
    return x, torch.empty_like(x, dtype=dy.dtype).copy_(dy)
