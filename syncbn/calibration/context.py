"""Arguments of the methods, and shared parts: input statistics, hooks and fixed points."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from syncbn.calibration.batches import Batches, Forward
from syncbn.calibration.ranks import Ranks
from syncbn.moments import Moments
from syncbn.nn.bn_layers import BNLayer, clone_running_stats
from syncbn.nn.module import SyncBatchNorm
from syncbn.nn.sample_stats import SampleStats, sample_stats

# Per-sample values that are buffered before they are summed.
_MAX_BUFFERED = 1 << 20
# Largest mean, in standard deviations, for seven digits of the variance from group norm.
_MAX_FAST_MEAN = 30
# Arguments of this library's layers. Layers of other libraries may use later positions otherwise.
_ARGUMENTS = ("input", "residual", "mask")
_MAX_PASSES = 50
# Roundings of the buffers within which two passes have the same statistics.
_ROUNDINGS = 16


@dataclass(frozen=True)
class InputStats:
    """Additive statistics over a set of samples, so ranks and batches combine exactly.

    The vector begins with two-part :class:`Moments` of all values. Sums over samples follow, from
    which the scatter between samples is computed. Sample i has n_i values per channel, of mean m_i
    and mean square q_i around the pivot. The sums are the number of samples and the sum of n_i^2,
    then n_i^2 times m_i, m_i^2, q_i, q_i^2 and m_i q_i, ``[C]`` each.

    Attributes:
        vector: all-reduce payload, float64 ``[9C + 3]``.
        pivot: value near the mean, the same on every rank, float64 ``[C]``.
    """

    vector: Tensor
    pivot: Tensor

    @staticmethod
    def from_samples(n: Tensor, mean: Tensor, var: Tensor, pivot: Tensor) -> InputStats:
        """Return the statistics of N samples.

        Args:
            n: values per channel in each sample, float64 ``[N, 1]``.
            mean: means of the samples, float64 ``[N, C]``.
            var: biased variances of the samples, float64 ``[N, C]``.
            pivot: shared pivot, float64 ``[C]``.
        """
        count = n.sum()
        center = (n * mean).sum(0) / count
        differences = mean - center
        first, second = (n * differences).sum(0), (n * (var + differences.square())).sum(0)
        moments = Moments.from_pivot(count, center, first, second, two_parts=True)
        m = mean - pivot
        q = var + m * m
        sums = ((n * n * s).sum(0) for s in (m, m * m, q, q * q, m * q))
        numbers = torch.stack([n.new_tensor(float(len(n))), (n * n).sum()])
        return InputStats(torch.cat([moments.pack(), numbers, *sums]), pivot)

    def __add__(self, other: InputStats) -> InputStats:
        """Return the statistics of both sets; they share the pivot."""
        return InputStats(self.vector + other.vector, self.pivot)

    @property
    def moments(self) -> Moments:
        """Moments of all values."""
        channels = len(self.pivot)
        return Moments.unpack(self.vector[: 4 * channels + 1], channels)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.scatter()[0])

    def scatter(self) -> Tensor:
        """Return the sums over samples, float64 ``[5C + 2]``."""
        return self.vector[4 * len(self.pivot) + 1 :]


class StatsAccumulator:
    """Accumulator of the inputs of one layer.

    Each sample is reduced to its mean and variance per channel at once, while it is in the cache
    and independently of its batch, so results cannot depend on the batch size.

    Args:
        pivot: value near the mean, the same on every rank, float64 ``[C]``.
        exact: True for full precision at any mean, in twice the time.
    """

    def __init__(self, pivot: Tensor, exact: bool = True) -> None:
        self._stats = InputStats(pivot.new_zeros(9 * len(pivot) + 3), pivot)
        self._exact = exact
        self._buffer: list[SampleStats] = []
        self._buffered = 0

    def add(self, x: Tensor) -> None:
        """Add an input, shape ``[N, C, *]``."""
        if not x.numel():
            return
        # In other memory formats, group norm subtracts large squares from each other.
        fast = not self._exact and x.dim() > 2 and x.is_contiguous()
        self._buffer.append(sample_stats(x, exact=not fast))
        self._buffered += self._buffer[-1].mean.numel()
        if self._buffered > _MAX_BUFFERED:
            self._flush()

    def stats(self) -> InputStats:
        """Return the statistics of all added inputs."""
        self._flush()
        return self._stats

    def has_lost_digits(self) -> bool:
        """Return True if the inputs must be read again by an exact accumulator."""
        if self._exact:
            return False
        moments = self.stats().moments
        return bool((moments.mean().square() > _MAX_FAST_MEAN**2 * moments.variance()).any())

    def _flush(self) -> None:
        if not self._buffer:
            return
        mean = torch.cat([s.exact_mean() for s in self._buffer])
        var = torch.cat([s.var.double() for s in self._buffer])
        n = torch.cat([var.new_full((len(s.mean), 1), s.n) for s in self._buffer])
        self._buffer, self._buffered = [], 0
        self._stats += InputStats.from_samples(n, mean, var, self._stats.pivot)


@dataclass(frozen=True)
class CalibrationContext:
    """Arguments of a method, equal on all ranks except for the batches.

    Attributes:
        model: network in inference mode, without communication.
        layers: layers to calibrate.
        pivots: old running means, the same on every rank, float64 ``[C]`` for each layer.
        batches: batches of this rank.
        forward: function that runs a batch through the model.
        ranks: ranks that calibrate together.
        max_bytes: memory limit for suspended passes on this rank; None for the free memory.
        report_progress: function called with the finished and the total number of work units.
        report_check: function called with a sentence about the verification of the result.
    """

    model: nn.Module
    layers: list[BNLayer]
    pivots: list[Tensor]
    batches: Batches
    forward: Forward
    ranks: Ranks
    max_bytes: int | None
    report_progress: Callable[[int, int], None]
    report_check: Callable[[str], None]

    def run(self, batch: Any) -> None:
        """Run a batch through the model."""
        self.forward(self.model, batch)

    def make_accumulator(self, layer: BNLayer, exact: bool = True) -> StatsAccumulator:
        """Return an empty accumulator; a fast one is possible if inputs can be read again."""
        return StatsAccumulator(self.pivots[layer.index], exact)

    def reduce_stats(self, layer: BNLayer, accumulator: StatsAccumulator) -> InputStats:
        """Return the statistics over the samples of all ranks; a collective.

        Raises:
            ValueError: some inputs are not finite, or have a single value per channel.
        """
        local = accumulator.stats()
        payload = self.ranks.all_reduce(local.vector, f"calibration of {layer.name}")
        stats = InputStats(payload, local.pivot)
        if not bool(payload.isfinite().all()):
            raise ValueError(
                f"{layer.name}: the inputs have NaN or infinite values, or squares beyond float64; "
                "expected finite activations (check the weights, the data, and earlier layers)"
            )
        if stats.moments.count == 1:
            raise ValueError(
                f"{layer.name}: got one value per channel in the whole calibration set, which has "
                "no variance; expected two or more samples"
            )
        return stats


@contextmanager
def hook_inputs(
    layers: Sequence[BNLayer], hook: Callable[[BNLayer, Tensor], None]
) -> Iterator[None]:
    """Call a function before each forward of the layers in the body.

    Args:
        layers: layers to hook.
        hook: function called with a layer and its input ``[N, C, *]``. The layer then normalizes
            with the statistics in its buffers at the function's return.

    Raises:
        ValueError: within the body, if a layer is called with a mask.
    """
    with ExitStack() as stack:
        for layer in layers:
            pre_hook = partial(_call_hook, hook, layer)
            stack.enter_context(layer.module.register_forward_pre_hook(pre_hook, with_kwargs=True))
        yield


def _call_hook(
    hook: Callable[[BNLayer, Tensor], None],
    layer: BNLayer,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    named = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    if isinstance(module, SyncBatchNorm) and named.get("mask") is not None:
        raise ValueError(
            f"{layer.name}: called with a mask; calibration supports unmasked inputs only"
        )
    # Subclasses of torch's layers may rename the input.
    x: Tensor = named["input"] if "input" in named else next(iter(named.values()))
    hook(layer, x.detach())


#: Statistics of the inputs of layers, over all calls of a layer in a forward.
Results: TypeAlias = dict[BNLayer, InputStats]


def solve_fixed_point(
    run_pass: Callable[[frozenset[BNLayer]], tuple[Results, set[BNLayer]]],
) -> Results:
    """Calibrate all layers, with repeated passes for layers that a forward calls several times.

    Later calls depend on the statistics used by earlier ones, so the pooled statistics are a fixed
    point, found by iteration.

    Args:
        run_pass: function that calibrates all layers in order, except the frozen ones passed to
            it. It returns the statistics of all layers, and the layers called several times.

    Returns:
        Statistics of the inputs of all layers, now set in the layers.
    """
    results, found = run_pass(frozenset())
    order, repeated = list(results), frozenset(found)
    passes, converged = 1, not repeated
    while not converged and passes < _MAX_PASSES:
        for layer in repeated:
            layer.set_moments(results[layer].moments)
        old = clone_running_stats(list(repeated))
        results, _ = run_pass(repeated)
        passes += 1
        converged = all(_is_converged(layer, results[layer], *stats) for layer, *stats in old)
    if not converged:
        names = ", ".join(sorted(layer.name for layer in repeated))
        warnings.warn(
            f"{names}: called more than once in a forward, and still changing after {passes} "
            "passes; the statistics are those of the last one",
            stacklevel=2,
        )
    for layer in repeated:
        layer.set_moments(results[layer].moments)
    return {layer: results[layer] for layer in order}


def _is_converged(layer: BNLayer, stats: InputStats, mean: Tensor, var: Tensor) -> bool:
    # In units of var + eps, the layer's divisor, which is not zero for constant channels.
    new_var = stats.moments.variance(unbiased=True)
    scale = new_var + layer.module.eps
    shift = (stats.moments.mean() - mean.double()).abs() / scale.sqrt()
    change = (new_var - var.double()).abs() / scale
    tolerance = _ROUNDINGS * torch.finfo(layer.running_mean.dtype).eps
    return bool(torch.maximum(shift, change).max() <= tolerance)
