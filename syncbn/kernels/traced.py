"""The kernels for compilers: few operations, in float64, which a compiler puts into few loops.

Nothing is written to memory between them, so that what would be a copy of twice the size elsewhere
is a conversion in a register here. What :mod:`syncbn.kernels.reference` does to keep float32 exact,
another pass over the input and twice as many operations to compile, is not needed. Float64 inputs
do need it: the reference computes their moments, and a single rank takes two passes.

Numbers by channel are packed before they meet the input again: a compiler would otherwise put
their arithmetic, roots and quotients, into the loop over the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.kernels import reference
from syncbn.kernels.coefficients import Forward, Running, Transform, Wanted
from syncbn.kernels.reference import per_channel, reduced_dims
from syncbn.moments import Moments, has_two_parts


def moments(x: Tensor) -> Tensor:
    """See :func:`syncbn.kernels.reference.moments`."""
    if has_two_parts(x.dtype):
        return reference.moments(x)
    dims, wide = reduced_dims(x), x.double()
    total = wide.sum(dims)
    return torch.cat([total, (wide * wide).sum(dims), total.new_full((1,), _values(x))])


def normalize(
    x: Tensor, message: Tensor, how: Forward, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`syncbn.kernels.reference.normalize`."""
    group = Moments.unpack(message, x.shape[1])
    mean, squares = group.mean_and_m2()
    var = squares / group.count.clamp(min=1)
    if how.running is not None:
        _move(mean, var, group.count, how.running)
    statistics = torch.cat([mean, (var + how.eps).rsqrt(), group.count.reshape(1)])
    return _output(x, statistics, how, residual), statistics


def backward_reduce(
    dy: Tensor, x: Tensor, transform: Transform, wanted: Wanted = (None, None)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`syncbn.kernels.reference.backward_reduce`."""
    sums = _sums(_through_relu(dy, x, transform), x, transform)
    return torch.cat(sums), *_parameter_gradients(sums, wanted)


def backward_elemt(
    dy: Tensor, x: Tensor, transform: Transform, sums: Tensor, may_overwrite: bool = False
) -> Tensor:
    """See :func:`syncbn.kernels.reference.backward_elemt`."""
    dy = _through_relu(dy, x, transform)
    return _input_gradient(dy, x, transform, _halves(x, sums), transform.values)


def forward_alone(x: Tensor, how: Forward, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`syncbn.kernels.alone.forward`. The number of values is known: it is left out."""
    values = _values(x)
    if has_two_parts(x.dtype):
        var, mean = _var_mean_in_two_passes(x)
    else:
        var, mean = torch.var_mean(x.double(), reduced_dims(x), correction=0)
    if values == 0:
        var, mean = torch.zeros_like(var), torch.zeros_like(mean)
    if how.running is not None and values > 1:
        _move(mean, var, values, how.running)
    statistics = torch.cat([mean, (var + how.eps).rsqrt()])
    return _output(x, statistics, how, residual), statistics


def backward_alone(
    dy: Tensor,
    x: Tensor,
    transform: Transform,
    wanted: Wanted,
    may_overwrite: bool = False,
    keep_sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :func:`syncbn.kernels.alone.backward`."""
    dy = _through_relu(dy, x, transform)
    sums = _sums(dy, x, transform)
    has_count = transform.statistics.numel() > 2 * x.shape[1]
    values = transform.values if has_count else max(_values(x), 1)
    dx = _input_gradient(dy, x, transform, sums, values)
    return torch.cat(sums), dx, *_parameter_gradients(sums, wanted)


def _var_mean_in_two_passes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the biased variance and the mean of float64 values, exact far from zero.

    Two-part moments would double the time of compilation.
    """
    dims = reduced_dims(x)
    pivot = x.mean(dims)
    centred = x - per_channel(pivot, x)
    rest = centred.mean(dims)
    return (centred.square().mean(dims) - rest.square()).clamp(min=0), pivot + rest


def _values(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _halves(x: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    return packed[:channels], packed[channels : 2 * channels]


def _sums(dy: Tensor, x: Tensor, transform: Transform) -> tuple[Tensor, Tensor]:
    """Return sum(dy) and sum(dy xhat)."""
    mean, invstd = _halves(x, transform.statistics)
    dims, wide = reduced_dims(x), dy.double()
    return wide.sum(dims), (wide * (x - per_channel(mean, x))).sum(dims) * invstd


def _parameter_gradients(
    sums: tuple[Tensor, Tensor], wanted: Wanted
) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = wanted
    dweight = None if weight is None else sums[1].to(weight.dtype)
    return dweight, None if bias is None else sums[0].to(bias.dtype)


def _scale(invstd: Tensor, weight: Tensor | None) -> Tensor:
    return invstd if weight is None else invstd * weight


def _affine(x: Tensor, transform: Transform) -> Tensor:
    mean, invstd = _halves(x, transform.statistics)
    scale = _scale(invstd, transform.weight)
    y = (x - per_channel(mean, x)) * per_channel(scale, x)
    return y if transform.bias is None else y + per_channel(transform.bias, x)


def _output(x: Tensor, statistics: Tensor, how: Forward, residual: Tensor | None) -> Tensor:
    y = _affine(x, Transform(statistics, how.weight, how.bias))
    if residual is not None:
        y = y + residual
    return (y.relu() if how.relu else y).to(x.dtype)


def _through_relu(dy: Tensor, x: Tensor, transform: Transform) -> Tensor:
    return dy.masked_fill(_affine(x, transform) <= 0, 0) if transform.relu else dy


def _input_gradient(
    dy: Tensor,
    x: Tensor,
    transform: Transform,
    sums: tuple[Tensor, Tensor],
    values: Tensor | int,
) -> Tensor:
    mean, invstd = _halves(x, transform.statistics)
    slope = sums[1] * invstd / values
    packed = torch.stack([slope, sums[0] / values, _scale(invstd, transform.weight)])
    slope, mean_dy, scale = (per_channel(v, x) for v in packed.unbind())
    # x * slope would lose the digits of a large mean, in float64 inputs.
    return ((dy - mean_dy - (x - per_channel(mean, x)) * slope) * scale).to(x.dtype)


def _move(mean: Tensor, var: Tensor, count: Tensor | int, running: Running) -> None:
    """Do as :func:`syncbn.kernels.reference.move_running` does."""
    with torch.no_grad():
        if isinstance(count, int):
            counts: Tensor | int = 1
            unbiased = var * (count / (count - 1))
        else:
            counts = count > 1
            unbiased = var * (count / (count - 1).clamp(min=1))
        if running.tracked is not None:
            running.tracked.add_(counts)
        weight: Tensor | float = running.momentum or 0.0
        if running.momentum is None and running.tracked is not None:
            weight = running.tracked.clamp(min=1).double().reciprocal()
        if isinstance(counts, Tensor):
            weight = counts.double() * weight
        for average, batch in ((running.mean, mean), (running.var, unbiased)):
            if average is not None:
                average.copy_(torch.lerp(average.double(), batch, weight))
