"""The kernels on CPU: ATen's single-pass batch-norm kernels, used for more than they were made for.

- The reduction of ATen's batch-norm *backward*, asked for no input gradient, returns sum(dy) and
  sum(dy (x - p)) in one pass at the speed of memory. With dy := x it gives the moments, too.
  (ATen's forward statistics are five times slower on contiguous float32.)
- Its *inference* kernel computes ``x * scale + shift`` in one pass.

Both add up numbers that are far from zero if x is, so each function bounds what is lost to
cancellation, and hands over to :mod:`syncbn.kernels.blocked`, precise for any values, where that is
too much. The four functions are those of :mod:`syncbn.kernels.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.kernels import blocked
from syncbn.kernels.blocked import RUN, Layout, dense, dense_pair
from syncbn.kernels.coefficients import compute_dtype, split_mean

# Largest amplification by cancellation of the error of ATen's sums, which is about 1e-7.
AMPLIFICATION = 4.0
# Largest |mean|/std at which x * scale + shift is off by a few roundings only.
NEAR_ZERO = 8.0
# Values that ATen sums one by one in float32 when channels are innermost.
SHORT_RUN = 1 << 6


def moments(x: Tensor) -> Tensor:
    """See :func:`syncbn.kernels.reference.moments`.

    One pass gives sum(x) and sum(x (x - p)), with p the mean of a few values, and from them::

        variance + (mean - p)^2 = sum(x (x - p))/n - p (mean - p)

    so errors of the sums are errors of the variance, those of the mean p times over. By Cauchy and
    Schwarz what was added up is at most ``sqrt(E x^2) (sqrt(E (x - p)^2) + |p|)`` a value. Channels
    where that is many times the variance are done again, the precise way.
    """
    channels = x.shape[1]
    count = x.numel() // channels
    x = dense(x)
    layout = Layout.of(x)
    if count == 0 or _has_long_runs(layout):
        return blocked.moments(x)
    pivot = layout.first_mean(x)
    total, product = _reduce(x, x, pivot, layout)
    pivot, mean = pivot.double(), total / count
    about_pivot = product / count - pivot * (mean - pivot)
    variance = about_pivot - (mean - pivot).square()
    mean_square = variance + mean.square()
    added = mean_square.sqrt() * (about_pivot.sqrt() + pivot.abs())
    # Negated, so that NaN counts as imprecise.
    imprecise = ~(added <= AMPLIFICATION * variance)
    message = torch.stack([total, mean_square * count])
    if imprecise.any():
        message[:, imprecise] = blocked.moments(x[:, imprecise])[:-1].view(2, -1)
    return torch.cat([message.view(-1), total.new_full((1,), count)])


def normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """See :func:`syncbn.kernels.reference.normalize`."""
    if x.numel() == 0 or not _near_zero(mean, invstd):
        return blocked.normalize(x, mean, invstd, weight, bias)
    x = dense(x)
    y = torch.empty_like(x)
    scale = invstd if weight is None else invstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    _scale_and_shift(x, scale, shift, out=y)
    return y


def backward_reduce(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """See :func:`syncbn.kernels.reference.backward_reduce`."""
    x, dy = dense_pair(x, dy)
    layout = Layout.of(x)
    if x.numel() == 0 or _has_long_runs(layout):
        return blocked.backward_reduce(dy, x, mean, invstd)
    pivot, rest = split_mean(mean, x.dtype)
    sum_dy, sum_dy_x = _reduce(dy, x, pivot, layout)
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
    """See :func:`syncbn.kernels.reference.backward_elemt`.

    ``dx = x a + b + dy c``: the first part in one pass, the last one block by block. Half types go
    to the blocked form, since the first part would be rounded to them.
    """
    half = x.dtype != compute_dtype(x.dtype)
    if x.numel() == 0 or half or not _near_zero(mean, invstd):
        return blocked.backward_elemt(dy, x, mean, invstd, weight, sums, count)
    x, dy = dense_pair(x, dy)
    dx = torch.empty_like(x)
    mean_dy, mean_dy_xhat = (sums / count.clamp(min=1)).view(2, -1)
    scale = invstd if weight is None else invstd * weight
    slope = invstd * mean_dy_xhat
    _scale_and_shift(x, -slope * scale, (mean * slope - mean_dy) * scale, out=dx)
    layout = Layout.of(x)
    gradients, target = layout.matrix(dy), layout.matrix(dx)
    scales = layout.spread(scale.to(x.dtype))
    for block in layout.blocks():
        target[block.where].add_(gradients[block.where] * blocked.at(scales, block))
    return dx


def _near_zero(mean: Tensor, invstd: Tensor) -> bool:
    """Return whether ``x * scale + shift`` is precise: no mean far from zero, and no NaN."""
    return bool((mean * invstd).abs().max() <= NEAR_ZERO)


def _has_long_runs(layout: Layout) -> bool:
    """Return whether ATen would sum more values in float32 than is precise."""
    return layout.by_row and layout.shape[1] > RUN


def _reduce(dy: Tensor, x: Tensor, pivot: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return sum(dy) and sum(dy (x - pivot)), each float64 ``[C]``.

    Args:
        dy: laid out like x.
        x: shape ``[N, C, *]``, contiguous or channels_last.
        pivot: compute dtype, shape ``[C]``.
        layout: of x.
    """
    channels = layout.channels
    sum_dy = torch.zeros(channels, dtype=torch.float64)
    sum_dy_x = torch.zeros(channels, dtype=torch.float64)
    gradients, values = (_runs(layout.matrix(t), layout) for t in (dy, x))
    for gradient, value in zip(gradients, values, strict=True):
        pivots = pivot.repeat(value.shape[1] // channels)
        ones = torch.ones_like(pivots)
        _, product, total = torch.ops.aten.native_batch_norm_backward(
            gradient, value, ones, None, None, pivots, ones, True, 0.0, [False, True, True]
        )
        sum_dy += total.double().view(-1, channels).sum(0)
        sum_dy_x += product.double().view(-1, channels).sum(0)
    return sum_dy, sum_dy_x


def _runs(matrix: Tensor, layout: Layout) -> list[Tensor]:
    """View a matrix as images ``[1, k C, length, 1]`` whose "channels" are short runs of values.

    What ATen sums in float32 stays short, so that float64 does the rest. Rows are runs. Where
    channels are innermost, k consecutive rows of the matrix are taken as one wide row.
    """
    rows, columns = matrix.shape
    if layout.by_row:
        return [matrix.view(1, rows, columns, 1)]
    k = max(1, rows // SHORT_RUN)
    whole = rows - rows % k
    wide = matrix[:whole].view(1, whole // k, 1, k * columns)
    rest = matrix[whole:].view(1, rows - whole, 1, columns)
    return [t.permute(0, 3, 1, 2) for t in (wide, rest) if t.numel()]


def _scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """Write ``x * scale + shift``, as an inference with mean 0, variance 1 and eps 0."""
    layout = Layout.of(x)
    scale, shift = scale.to(compute_dtype(x.dtype)), shift.to(compute_dtype(x.dtype))
    mean, var, unused = torch.zeros_like(scale), torch.ones_like(scale), scale.new_empty(0)
    torch.native_batch_norm(
        layout.image(x), scale, shift, mean, var, False, 0.0, 0.0,
        out=(layout.image(out), unused, unused.clone()),
    )  # fmt: skip
