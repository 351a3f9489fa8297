"""The layers, as in torch.nn.SyncBatchNorm, and the conversion of models to them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from syncbn.distributed.groups import GroupLike, resolve_group
from syncbn.kernels.activations import ActivationName
from syncbn.nn.adapters import Adapter, Adapters
from syncbn.nn.conversion import Conversion
from syncbn.nn.fx_call import record_call
from syncbn.nn.layer_state import DetachedGroup as DetachedGroup
from syncbn.nn.layer_state import LayerState, normalize_input
from syncbn.ops.validation import check_activation

M = TypeVar("M", bound=nn.Module)


class SyncBatchNorm(LayerState):
    """Batch normalization over the batches of every rank of a process group.

    In training, the layer normalizes with the exact mean and variance of the concatenated batch,
    and its gradients take both into account. Batches may have different sizes on each rank, or be
    empty. In evaluation it uses the running statistics, without communication. Constructor, buffers
    and ``state_dict`` equal :class:`torch.nn.SyncBatchNorm`'s, and checkpoints interchange with
    ``torch.nn.BatchNorm*``. Works on CPU and CUDA.

    Every rank of the group must run its synchronized layers in the same order, forward and
    backward. On CPU every all-reduce checks this, on CUDA with ``TORCH_DISTRIBUTED_DEBUG=INFO``;
    with ``DETAIL`` the error names the layer of every rank.

    Args:
        num_features: C of an input of shape ``[N, C, *]``.
        eps: constant added to the variance.
        momentum: weight of a batch in the running statistics; None for a cumulative average.
        affine: True for a learnable weight and bias.
        track_running_stats: True for running statistics. Without them, evaluation normalizes with
            the batch of this rank, as in torch.
        process_group: ranks whose batches are normalized together: a process group, a
            one-dimensional ``DeviceMesh``, or None for all ranks. "node" or a number of ranks is
            accepted, but creates a group per layer: pass it to :func:`convert_sync_batchnorm`.
        device: device of parameters and buffers.
        dtype: dtype of parameters and running statistics.
        bias: False for a layer without bias.
        activation: last operation, fused: "relu", "relu6", "leaky_relu", "silu", "hardswish",
            "gelu" or None. ``torch.nn.utils.fusion`` ignores it: undo ``syncbn.fuse`` first.
        negative_slope: slope of "leaky_relu" below zero, at least 0.

    Attributes:
        impl: name of a kernel, a module of :mod:`syncbn.kernels`; "auto" selects one per input.
        normalization_batch: samples that are normalized together, or None for the batch of the
            group; :func:`convert_sync_batchnorm` sets it.
        fqn: fully qualified name in error messages; :func:`convert_sync_batchnorm` sets it, also on
            a model whose layers were built by hand.
        process_group: process group; :func:`convert_sync_batchnorm` also sets it.

    A layer that had an attribute ``activation``, ``negative_slope``, ``process_group``,
    ``normalization_batch``, ``impl`` or ``fqn`` before its conversion keeps it, and the library
    ignores it. On layers of a user's subclass of ``nn.BatchNorm*`` these names always belong to the
    subclass: use :func:`convert_sync_batchnorm` to change the group of such layers.

    Shape:
        - Input: ``[N, C, *]``, float16, bfloat16, float32 or float64; N may be zero.
        - Output: shape, dtype and memory layout (contiguous, channels_last) of the input.

    Raises:
        ValueError: see :func:`syncbn.sync_batch_norm`.
        RuntimeError: the transport failed or timed out; the message names the layer. Also when
            ``torch.fx`` traces a layer with hooks, or a layer that is the root of the trace.

    Example::

        model = syncbn.convert_sync_batchnorm(model)       # every nn.BatchNorm* in it
        layer = syncbn.SyncBatchNorm2d(64)                 # or by hand

    Reference:
        Ioffe and Szegedy, Batch Normalization, 2015, section 3.
    """

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
        activation: ActivationName | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self._syncbn_group = resolve_group(process_group)
        check_activation(activation, negative_slope)
        self._syncbn_activation = activation
        self._syncbn_negative_slope = negative_slope

    @classmethod
    def convert_sync_batchnorm(cls, module: M, process_group: GroupLike = None) -> M:
        """See :func:`syncbn.convert_sync_batchnorm`."""
        return convert_sync_batchnorm(module, process_group)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalize; in training, also update the running statistics.

        Args:
            input: shape ``[N, C, *]``.
            residual: tensor added before the activation, as torch adds; fused if it has the shape
                and dtype of the input. Or None.
            mask: bool, True where the input counts, shape ``[N, *]`` or ``[N, 1, *]``, or
                broadcastable to it; None for everywhere. The output is zero elsewhere.
        """
        if isinstance(input, Proxy):
            return record_call(self, input, residual, mask)
        return normalize_input(self, input, residual, mask)

    def extra_repr(self) -> str:
        """Return the arguments that ``print`` shows."""
        text: str = super().extra_repr()
        if self._syncbn_activation is not None:
            text += f", activation={self._syncbn_activation!r}"
        if self._syncbn_activation == "leaky_relu":
            text += f", negative_slope={self._syncbn_negative_slope}"
        if self._syncbn_normalization_batch is not None:
            text += f", normalization_batch={self._syncbn_normalization_batch}"
        return text

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions; the 1d, 2d and 3d classes are stricter."""


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """:class:`SyncBatchNorm` for ``[N, C]`` or ``[N, C, L]``; also an ``nn.BatchNorm1d``."""

    def _check_input_dim(self, input: Tensor) -> None:
        nn.BatchNorm1d._check_input_dim(self, input)


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """:class:`SyncBatchNorm` for ``[N, C, H, W]``; also an ``nn.BatchNorm2d``."""

    def _check_input_dim(self, input: Tensor) -> None:
        nn.BatchNorm2d._check_input_dim(self, input)


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """:class:`SyncBatchNorm` for ``[N, C, D, H, W]``; also an ``nn.BatchNorm3d``."""

    def _check_input_dim(self, input: Tensor) -> None:
        nn.BatchNorm3d._check_input_dim(self, input)


class LazySyncBatchNorm1d(_LazyNormBase, SyncBatchNorm1d):
    """Becomes a :class:`SyncBatchNorm1d` in its first forward."""

    cls_to_become = SyncBatchNorm1d


class LazySyncBatchNorm2d(_LazyNormBase, SyncBatchNorm2d):
    """Becomes a :class:`SyncBatchNorm2d` in its first forward."""

    cls_to_become = SyncBatchNorm2d


class LazySyncBatchNorm3d(_LazyNormBase, SyncBatchNorm3d):
    """Becomes a :class:`SyncBatchNorm3d` in its first forward."""

    cls_to_become = SyncBatchNorm3d


def convert_sync_batchnorm(
    module: M,
    process_group: GroupLike = None,
    *,
    adapters: Adapters | None = None,
    normalization_batch: int | None = None,
) -> M:
    """Make every batch-norm layer of a model synchronized, in place.

    Converts ``nn.BatchNorm1d/2d/3d``, their lazy forms, ``nn.SyncBatchNorm``, and subclasses of
    ``nn.BatchNorm*`` that inherit ``forward``; a converted subclass stays an instance of its class.
    Synchronized layers get the group and their name. :mod:`syncbn.nn.adapters` holds batch-norm
    layers of other libraries with additional operations. Another layer that overrides ``forward``,
    or methods that synchronization replaces, would lose behaviour: it is left alone, with a
    warning. :func:`revert_sync_batchnorm` is the exact inverse.

    Args:
        module: a model or a single layer.
        process_group: ranks whose batches form one batch: None (all ranks; layers with a group keep
            it), "world", "node", a number of consecutive ranks, lists of ranks, a one-dimensional
            ``DeviceMesh``, or a process group. "node", numbers and lists create a group, so every
            rank must call this.
        adapters: functions ``adapter(layer, normalize, x)`` by class of layer: the layer's own
            forward with ``normalize(x)`` in place of its batch norm. A layer must have the tensors
            and settings of an ``nn.BatchNorm2d``.
        normalization_batch: number of samples that are normalized together, whatever the number of
            ranks: batches of several ranks if each holds fewer, parts of a batch if it holds more
            (:mod:`syncbn.ops.virtual_batch`). All ranks must have batches of one size that divides
            this number or is a multiple of it. None for the batch of the whole group.

    Returns:
        The same module.

    Raises:
        ValueError: the group is not valid; see :func:`syncbn.distributed.resolve_group`. Or the
            adapters are no functions by class, or their layers lack attributes; no layer was
            changed.
        RuntimeError: torch.distributed must create a group and is not initialized.
    """
    _CONVERSION.convert(module, process_group, adapters, normalization_batch)
    return module


def revert_sync_batchnorm(module: M) -> M:
    """Restore the original class of every synchronized layer of a model, in place.

    Layers built as ``syncbn.SyncBatchNorm1d/2d/3d`` become ``nn.BatchNorm1d/2d/3d``. A
    ``syncbn.SyncBatchNorm``, which accepts any number of dimensions, becomes ``nn.SyncBatchNorm``
    and keeps its group. A user's subclass of these classes has no original and stays.

    Args:
        module: a model or a single layer.

    Returns:
        The same module.

    Raises:
        ValueError: a layer has an activation, which torch's layers lack; no layer was changed.
    """
    _CONVERSION.revert(module)
    return module


def _new_layer(original: type[_BatchNorm], adapter: Adapter | None = None) -> nn.Module:
    # Pickles of converted subclasses name this function.
    return _CONVERSION.new_layer(original, adapter)


_CONVERSION = Conversion(
    {
        nn.BatchNorm1d: SyncBatchNorm1d,
        nn.BatchNorm2d: SyncBatchNorm2d,
        nn.BatchNorm3d: SyncBatchNorm3d,
        nn.SyncBatchNorm: SyncBatchNorm,
        nn.LazyBatchNorm1d: LazySyncBatchNorm1d,
        nn.LazyBatchNorm2d: LazySyncBatchNorm2d,
        nn.LazyBatchNorm3d: LazySyncBatchNorm3d,
    },
    _new_layer,
)
