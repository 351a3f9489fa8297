"""Normalization by running statistics that are learned over ranks: for reinforcement learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.distributed import collectives
from syncbn.distributed.groups import GroupLike, active_group, resolve_group
from syncbn.kernels import select_kernel
from syncbn.kernels.coefficients import compute_dtype, forward_coefficients
from syncbn.moments import Moments, add_packed
from syncbn.nn.layer_state import DetachedGroup, LayerState


class RunningNorm(nn.Module):
    """Normalize by the mean and standard deviation of all samples of all ranks so far.

    ``y = (x - mean) / (std + eps)``, with the statistics of the concatenated stream: exact for any
    number of ranks, uneven and empty batches, and any order. :meth:`update` adds samples, in one
    all-reduce; calling the module only normalizes. The state is a buffer of float64 sums, so a
    resumed run continues bit for bit.

    Replaces rsl_rl's ``EmpiricalNormalization`` (same arguments and methods; its statistics are of
    one rank) and baselines' ``RunningMeanStd(epsilon, shape)``, as ``RunningNorm(shape,
    prior_count=epsilon)``.

    Args:
        shape: shape of a sample; ``()`` for scalars, such as returns.
        eps: constant added to the standard deviation.
        until: number of samples after which statistics are final; None for never. The update that
            reaches it counts whole. On CUDA this check waits for the device.
        clip: outputs of :meth:`normalize` are limited to ``[-clip, clip]``; None for no limit.
        prior_count: number of samples of mean 0 and variance 1 in the initial statistics, counted
            once, not per rank. Without any, these are the statistics until the first update.
        process_group: ranks that learn together; as in :func:`syncbn.convert_sync_batchnorm`.
        device: device of the statistics.

    Attributes:
        mean: mean, float64, shape ``shape``.
        var: variance of the population (biased), float64, shape ``shape``.

    Raises:
        ValueError: an argument that is negative or not finite, or an invalid group.

    Example::

        norm = syncbn.RunningNorm(obs_dim)
        norm.update(obs)  # every rank, in training mode
        action = policy(norm(obs))

    Reference:
        Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983, for sets that
        add; :class:`syncbn.moments.Moments` for the sums.
    """

    mean: Tensor
    var: Tensor
    _moments: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        eps: float = 1e-2,
        until: int | None = None,
        *,
        clip: float | None = None,
        prior_count: float = 0.0,
        process_group: GroupLike = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("eps", eps), ("clip", clip), ("prior_count", prior_count)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"got {name} {value!r}; expected a finite number of at least 0")
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.eps, self.until, self.clip = eps, until, clip
        self._syncbn_group: Any = resolve_group(process_group)
        zeros = torch.zeros(self.shape, dtype=torch.float64, device=device)
        count = zeros.new_full((), prior_count)
        flat = zeros.flatten()
        prior = Moments.from_pivot(count, flat, flat, flat + count, two_parts=True)
        self.register_buffer("mean", zeros)
        self.register_buffer("var", torch.ones_like(zeros))
        self.register_buffer("_moments", prior.pack())

    # A live group cannot be copied or pickled.
    __getstate__ = LayerState.__getstate__
    __copy__ = LayerState.__copy__
    __deepcopy__ = LayerState.__deepcopy__

    def _apply(self, fn: Any, recurse: bool = True) -> RunningNorm:
        # A model in half precision keeps exact statistics.
        def move(t: Tensor) -> Tensor:
            moved: Tensor = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        applied: RunningNorm = super()._apply(move, recurse)
        return applied

    @property
    def process_group(self) -> Any:
        """Process group; None for all ranks. An unpickled module needs a new one."""
        return self._syncbn_group

    @process_group.setter
    def process_group(self, group: GroupLike) -> None:
        self._syncbn_group = resolve_group(group)

    @property
    def count(self) -> Tensor:
        """Number of samples, with the prior: float64 scalar."""
        return self._moments[-1]

    @property
    def std(self) -> Tensor:
        """Standard deviation of the population, float64, shape ``shape``."""
        return self.var.sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`normalize`."""
        return self.normalize(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Return ``(x - mean) / (std + eps)``, clipped, in x's dtype.

        Args:
            x: samples, floating, shape ``[*, *shape]``.
        """
        self._check_samples(x)
        mean, scale = self.mean, (self.std + self.eps).reciprocal()
        pivot, scale, shift = forward_coefficients(mean, scale, None, None, x.dtype)
        y = ((x - pivot) * scale + shift).to(x.dtype)
        return y if self.clip is None else y.clamp(-self.clip, self.clip)

    def denormalize(self, y: Tensor) -> Tensor:
        """Return ``y * (std + eps) + mean``, the inverse of :meth:`normalize` without its clipping.

        Args:
            y: normalized samples, floating, shape ``[*, *shape]``.
        """
        self._check_samples(y)
        dtype = compute_dtype(y.dtype)
        return (y * (self.std + self.eps).to(dtype) + self.mean.to(dtype)).to(y.dtype)

    #: Alias used by rsl_rl.
    inverse = denormalize

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the samples of all ranks to the statistics; a collective of one all-reduce.

        In evaluation mode, and after ``until`` samples, there is no update and no communication.

        Args:
            x: samples of this rank, floating, shape ``[*, *shape]``; may be empty.
            mask: bool, True for samples that count, the leading dimensions of x; None for all.

        Raises:
            ValueError: another shape or dtype; on CPU also NaN or infinities on any rank. The
                statistics are unchanged, on every rank.
            RuntimeError: the transport failed or timed out.
        """
        if not self.training or (self.until is not None and self.count >= self.until):
            return
        self._check_samples(x)
        rows = x.detach().reshape(-1, max(math.prod(self.shape), 1))
        if mask is not None:
            rows = rows[self._check_mask(x, mask)]
        rows = rows.to(torch.float64)
        moments = select_kernel("auto", rows).moments(rows)
        label = f"RunningNorm{self.shape} update"
        if isinstance(self._syncbn_group, DetachedGroup):
            raise RuntimeError(
                f"{label}: was unpickled and has lost its process group of the ranks "
                f"{list(self._syncbn_group.ranks)}; set the attribute process_group"
            )
        moments = collectives.all_reduce(moments, active_group(self._syncbn_group), label)
        if moments.is_cpu and not moments.isfinite().all():
            raise ValueError(
                f"{label}: got NaN or infinities on some rank; expected finite samples (pass a "
                "mask to leave out the rest)"
            )
        add_packed(self._moments, moments, rows.shape[1])
        self._derive_statistics(rows.shape[1])

    def _derive_statistics(self, channels: int) -> None:
        total = Moments.unpack(self._moments, channels)
        is_known = total.count > 0
        for buffer, value in ((self.mean, total.mean()), (self.var, total.variance())):
            buffer.copy_(torch.where(is_known, value.view(self.shape), buffer))

    def _check_samples(self, x: Tensor) -> None:
        trailing = tuple(x.shape[x.ndim - len(self.shape) :]) if x.ndim >= len(self.shape) else None
        if trailing != self.shape or not x.is_floating_point():
            raise ValueError(
                f"got samples of shape {tuple(x.shape)} and {x.dtype}; expected a floating tensor "
                f"whose shape ends in {self.shape}"
            )

    def _check_mask(self, x: Tensor, mask: Tensor) -> Tensor:
        leading = tuple(x.shape[: x.ndim - len(self.shape)])
        if mask.dtype != torch.bool or tuple(mask.shape) != leading:
            raise ValueError(
                f"got a mask of shape {tuple(mask.shape)} and {mask.dtype}; expected torch.bool "
                f"and {leading}, the leading dimensions of the samples"
            )
        return mask.reshape(-1)

    def extra_repr(self) -> str:
        """Return the arguments that ``print`` shows."""
        return f"{self.shape}, eps={self.eps}, until={self.until}, clip={self.clip}"
