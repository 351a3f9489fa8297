"""Batch-norm layers of a model: their names in the plain model and their running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from syncbn.moments import Moments


@dataclass(frozen=True)
class BNLayer:
    """A batch-norm layer with running statistics.

    Attributes:
        index: position among the layers of the model, the same on every rank.
        name: dotted name from :func:`plain_name`; the first name of a shared layer.
        module: ``nn.BatchNorm*``, ``nn.SyncBatchNorm`` or a layer of this library.
    """

    index: int
    name: str
    module: _BatchNorm

    @property
    def channels(self) -> int:
        """Number of channels, C."""
        return self.running_mean.numel()

    @property
    def running_mean(self) -> Tensor:
        """Running mean, shape ``[C]``."""
        mean = self.module.running_mean
        assert mean is not None
        return mean

    @property
    def running_var(self) -> Tensor:
        """Running variance, shape ``[C]``."""
        var = self.module.running_var
        assert var is not None
        return var

    def set_running_stats(self, mean: Tensor, var: Tensor) -> None:
        """Copy a mean and a variance, shape ``[C]`` each, into the buffers."""
        with torch.no_grad():
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)

    def set_moments(self, moments: Moments, unbiased: bool = True) -> None:
        """Copy the mean and variance of moments into the buffers, unless the count is zero.

        Args:
            moments: moments of the layer's input, shape ``[C]``.
            unbiased: True for the unbiased variance, as in running statistics.

        Raises:
            ValueError: the statistics are not finite in the dtype of the buffers.
        """
        if moments.count > 0:
            self.set_running_stats(moments.mean(), moments.variance(unbiased=unbiased))
            if not bool((self.running_mean + self.running_var).isfinite().all()):
                raise ValueError(
                    f"{self.name}: the mean or variance of the inputs is NaN, infinite, or beyond "
                    f"the range of its buffers, which are {self.running_var.dtype}; expected "
                    "finite inputs, and buffers that can hold their statistics (such as float32)"
                )


#: Layers with copies of their running means and variances, shape ``[C]``.
SavedStatistics: TypeAlias = list[tuple[BNLayer, Tensor, Tensor]]


def clone_running_stats(layers: Sequence[BNLayer]) -> SavedStatistics:
    """Return the layers with copies of their running statistics."""
    with torch.no_grad():
        return [(layer, layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]


def restore_running_stats(stats: SavedStatistics) -> None:
    """Copy saved running statistics back into the buffers."""
    for layer, mean, var in stats:
        layer.set_running_stats(mean, var)


def find_layers(model: nn.Module) -> list[BNLayer]:
    """Return all batch-norm layers of a model, each once.

    Raises:
        ValueError: the model has no batch-norm layer, or :func:`require_running_stats` fails.
    """
    named = named_batch_norms(model)
    for name, module in named:
        require_running_stats(name, module)
    return [BNLayer(index, name, module) for index, (name, module) in enumerate(named)]


def named_batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Return the batch-norm modules with their names in the plain model, each once.

    Raises:
        ValueError: the model has no batch-norm layer.
    """
    named = [
        (plain_name(name, model), module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    ]
    if not named:
        raise ValueError(
            f"got {type(model).__name__} without a batch-norm layer; expected nn.BatchNorm*, "
            "nn.SyncBatchNorm or syncbn layers in it"
        )
    return named


def require_running_stats(name: str, module: _BatchNorm) -> None:
    """Raise unless a layer normalizes with running statistics in evaluation mode.

    Raises:
        ValueError: the layer has an inference rule (:mod:`syncbn.inference`), no size yet (lazy
            layers), no running statistics, or integer ones.
    """
    if (rule := module._modules.get("_syncbn_rule")) is not None:
        raise ValueError(
            f"{name}: follows {rule} instead of its running statistics; expected a layer "
            "without an inference rule (remove it with syncbn.inference.revert_inference)"
        )
    mean, var = module.running_mean, module.running_var
    if isinstance(mean, nn.UninitializedBuffer):
        raise ValueError(
            f"{name}: got a lazy layer without a size; run one batch through the model first"
        )
    if mean is None or var is None:
        raise ValueError(
            f"{name}: got a layer with track_running_stats=False, which has no population "
            "statistics and makes the inputs of later layers depend on the batch size; expected "
            "running_mean and running_var"
        )
    for buffer in (mean, var):
        if not buffer.is_floating_point():
            raise ValueError(
                f"{name}: got running statistics of dtype {buffer.dtype}, which cannot hold a "
                "fraction; expected floating-point buffers (such as buffer.float())"
            )


def plain_name(name: str, model: nn.Module) -> str:
    """Return a module's name without the prefixes of DDP and ``torch.compile``."""
    name = name.replace("_orig_mod.", "").removesuffix("_orig_mod")
    while True:
        if isinstance(model, DistributedDataParallel):
            name, model = name.removeprefix("module").removeprefix("."), model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return name
