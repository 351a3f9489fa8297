"""The layer: parameters, buffers and running averages, as in torch.nn.SyncBatchNorm."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.autograd import Call, normalize
from syncbn.distributed.collectives import communicating_group
from syncbn.distributed.groups import GroupLike, resolve_group
from syncbn.functional import (
    Activation,
    check_activation,
    check_input,
    check_mask,
    check_parameters,
    evaluate,
)
from syncbn.kernels import Running, choose

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class DetachedGroup:
    """What is left of a process group in a pickle: a live one cannot leave its process.

    Attributes:
        ranks: global ranks that were in the group; none if it had been destroyed.
    """

    ranks: tuple[int, ...]


class SyncBatchNorm(_BatchNorm):
    """Batch normalization over the batches of every rank of a process group.

    In training, mean and variance, and the gradient terms that depend on them, are those of the
    concatenated batch, exactly: batches may have different sizes on each rank, or none. In
    evaluation the running averages are used and nothing is sent. Constructor, buffers and
    ``state_dict`` are those of :class:`torch.nn.SyncBatchNorm`, and checkpoints of
    ``torch.nn.BatchNorm*`` load both ways. Works on CPU and CUDA.

    Every rank of the group must run its synchronized layers in the same order, forward and
    backward. ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` compares their names, channels and input dtypes
    before every message, and names the ranks and layers that disagree.

    Args:
        num_features: C of an input of shape ``[N, C, *]``.
        eps: added to the variance.
        momentum: weight of a batch in the running averages; None for a cumulative average.
        affine: have a learnable weight and bias.
        track_running_stats: keep running averages. Without them evaluation, too, normalizes with
            the batch; that of this rank, as in torch.
        process_group: the ranks whose batches count as one: a process group, a one-dimensional
            ``DeviceMesh``, or None for all ranks. "node" or a number of ranks is accepted, but
            makes a group for each layer: for a model, give it to :func:`convert_sync_batchnorm`.
        device: of parameters and buffers.
        dtype: of parameters and running averages.
        bias: with ``affine``, have a bias.
        activation: "relu", applied last in the same pass over the memory, or None. What makes
            other layers of this one, such as ``torch.nn.utils.fusion``, does not know of it.

    Attributes:
        sync_kernel: name of the module of :mod:`syncbn.kernels` that computes; "auto" chooses.
        sync_name: how error messages call this layer; :func:`convert_sync_batchnorm` sets it, also
            on a model whose layers were built by hand.

    Shape:
        - Input: ``[N, C, *]``, float16, bfloat16, float32 or float64; N may be zero.
        - Output: as the input, dtype and memory layout (contiguous, channels_last) included.

    Raises:
        ValueError: see :func:`syncbn.sync_batch_norm`; also if C is not ``num_features``.
        RuntimeError: the transport failed or timed out; the message names the layer.

    Example::

        model = syncbn.convert_sync_batchnorm(model)       # every nn.BatchNorm* in it
        layer = syncbn.SyncBatchNorm2d(64)                 # or by hand

    Reference:
        Ioffe and Szegedy, Batch Normalization, 2015, section 3.
    """

    process_group: dist.ProcessGroup | DetachedGroup | None
    sync_kernel: str = "auto"
    sync_name: str = ""
    activation: Activation | None = None
    # Where accumulate_statistics() adds up moments, while it does.
    pending_moments: Tensor | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: GroupLike = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if affine and not bias:
            # Not passed up: torch.nn.BatchNorm has this argument only in recent releases.
            self.register_parameter("bias", None)
        self.process_group = resolve_group(process_group)
        if activation is not None:
            self.activation = activation

    @classmethod
    def convert_sync_batchnorm(cls, module: M, process_group: GroupLike = None) -> M:
        """See :func:`syncbn.convert_sync_batchnorm`."""
        from syncbn.convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalize; in training, also update the running averages.

        Args:
            input: shape ``[N, C, *]``.
            residual: added to what is normalized, before the activation, as torch adds; in the same
                pass if it has the shape and dtype of the input. Or None.
            mask: bool, true where the input counts, shape ``[N, *]`` or ``[N, 1, *]``, or what
                broadcasts to it; None for everywhere. Elsewhere the output is zero.
        """
        self._check_input_dim(input)
        check_input(input)
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"{self._label()}: got an input of shape {tuple(input.shape)}; expected "
                f"{self.num_features} channels in dimension 1"
            )
        weight, bias, mean, var, tracked = self._tensors()
        check_parameters(input, weight, bias, mean, var)
        mask = None if mask is None else check_mask(input, mask)
        if not self.training and mean is not None and var is not None:
            numbers = mean, var, weight, bias, self.eps
            return evaluate(input, *numbers, residual, self.activation, mask)
        # In evaluation without running averages the batch is that of this rank, as in torch.
        group = self.communicating_group() if self.training else None
        kernel = choose(self.sync_kernel, input, weight, bias, mean, var, residual)
        running, pending = None, None
        if self.training and self.track_running_stats:
            pending = self.pending_moments
            if pending is None:
                running = Running(mean, var, tracked, self.momentum)
        relu = self.activation is not None
        # A name would make a graph of its own for each of many layers that are compiled alike.
        label = "" if torch.compiler.is_compiling() else self._label()
        call = Call(self.eps, relu, running, group, kernel, label, None, pending)
        return normalize(input, weight, bias, residual, mask, call)

    def communicating_group(self) -> dist.ProcessGroup | None:
        """Return the group to talk to, or None if this process is alone in it.

        Raises:
            RuntimeError: the layer was unpickled and has lost its group.
            ValueError: this rank is not in the group.
        """
        if isinstance(self.process_group, DetachedGroup):
            raise RuntimeError(
                f"{self._label()}: was unpickled and has lost its process group of the ranks "
                f"{list(self.process_group.ranks)}; give it one with convert_sync_batchnorm("
                "model, process_group=...)"
            )
        return communicating_group(self.process_group)

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the layer."""
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            # A module would be registered, and not be seen.
            check_activation(value)
        super().__setattr__(name, value)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """Return weight, bias, running averages and counter."""
        own, kept = self._parameters, self._buffers
        try:
            # What nn.Module finds by looking everywhere, which takes a microsecond each.
            averages = kept["running_mean"], kept["running_var"], kept["num_batches_tracked"]
            return own["weight"], own["bias"], *averages
        except KeyError:  # some are computed, or stand for others
            averages = self.running_mean, self.running_var, self.num_batches_tracked
            return self.weight, self.bias, *averages

    def _label(self) -> str:
        kind = f"{type(self).__name__}({self.num_features})"
        return f"{self.sync_name} {kind}" if self.sync_name else kind

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept what :func:`check_input` accepts; the 1d, 2d and 3d classes are stricter."""

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if isinstance(group := self.process_group, dist.ProcessGroup):
            try:
                ranks = tuple(dist.get_process_group_ranks(group))
            except KeyError:  # the group has been destroyed
                ranks = ()
            state["process_group"] = DetachedGroup(ranks)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        # A copy talks to the same ranks; the default would go through __getstate__.
        group = self.__dict__.get("process_group")
        memo[id(group)] = group
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        # What accumulates is the original.
        clone.__dict__.pop("pending_moments", None)
        return clone


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """:class:`SyncBatchNorm` for ``[N, C]`` or ``[N, C, L]``; also an ``nn.BatchNorm1d``."""

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """:class:`SyncBatchNorm` for ``[N, C, H, W]``; also an ``nn.BatchNorm2d``."""

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """:class:`SyncBatchNorm` for ``[N, C, D, H, W]``; also an ``nn.BatchNorm3d``."""

    _check_input_dim = nn.BatchNorm3d._check_input_dim
