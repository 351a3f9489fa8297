"""The layers to calibrate: found, read and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from syncbn.moments import Moments


@dataclass(frozen=True)
class Layer:
    """A batch-norm layer with running statistics.

    Attributes:
        index: among the layers of its model, the same on every rank.
        name: in the model, without what wrappers add; the first one of a shared layer.
        module: ``nn.BatchNorm*``, ``nn.SyncBatchNorm`` or a layer of this library.
    """

    index: int
    name: str
    module: _BatchNorm

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.running_mean.numel()

    @property
    def running_mean(self) -> Tensor:
        """The buffer, ``[C]``."""
        mean = self.module.running_mean
        assert mean is not None
        return mean

    @property
    def running_var(self) -> Tensor:
        """The buffer, ``[C]``."""
        var = self.module.running_var
        assert var is not None
        return var

    def use(self, mean: Tensor, var: Tensor) -> None:
        """Normalize with these statistics from now on; writes to the buffers in place.

        Args:
            mean: ``[C]``.
            var: ``[C]``.
        """
        with torch.no_grad():
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)

    def use_moments(self, moments: Moments, unbiased: bool = True) -> None:
        """Normalize with the mean and the variance of moments from now on, if they have values.

        Args:
            moments: ``[C]``.
            unbiased: take the unbiased variance, that of running averages.

        Raises:
            ValueError: they are beyond the dtype of the buffers.
        """
        if moments.count > 0:
            self.use(moments.mean(), moments.variance(unbiased=unbiased))
            if not bool((self.running_mean + self.running_var).isfinite().all()):
                raise ValueError(
                    f"{self.name}: the mean or variance of the inputs is beyond the range of its "
                    f"buffers, which are {self.running_var.dtype}; expected buffers that can hold "
                    "it (calibrate the model in float32)"
                )


#: Layers with copies of their running means and variances, ``[C]``.
Backup: TypeAlias = list[tuple[Layer, Tensor, Tensor]]


def find_layers(model: nn.Module) -> list[Layer]:
    """Return the batch-norm layers that have running statistics, each once.

    Raises:
        ValueError: the model has no batch-norm layer; see also :func:`require_statistics`.
    """
    layers = [Layer(index, name, module) for index, (name, module) in enumerate(batch_norms(model))]
    for layer in layers:
        require_statistics(layer.name, layer.module)
    return layers


def batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Return the batch-norm layers with their names in the plain model, each once.

    Raises:
        ValueError: the model has no batch-norm layer.
    """
    found = [
        (plain_name(name, model), module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    ]
    if not found:
        raise ValueError(
            f"got {type(model).__name__} without a batch-norm layer; expected nn.BatchNorm*, "
            "nn.SyncBatchNorm or syncbn layers in it"
        )
    return found


def require_statistics(name: str, module: _BatchNorm) -> None:
    """Raise unless a layer normalizes with running statistics in evaluation mode.

    Raises:
        ValueError: the layer follows a rule of :mod:`syncbn.inference`; is lazy and has no size
            yet; has no running statistics, or integer ones.
    """
    if (rule := module._modules.get("_syncbn_rule")) is not None:
        raise ValueError(
            f"{name}: follows {rule} instead of its running statistics; expected a layer "
            "without a rule (syncbn.inference.revert_inference takes it away)"
        )
    mean, var = module.running_mean, module.running_var
    if isinstance(mean, nn.UninitializedBuffer):
        raise ValueError(
            f"{name}: got a lazy layer without a size; run one batch through the model first"
        )
    if mean is None or var is None:
        raise ValueError(
            f"{name}: got a layer with track_running_stats=False, which has no population "
            "statistics and makes those of later layers depend on the batch size; expected "
            "running_mean and running_var"
        )
    for buffer in (mean, var):
        if not buffer.is_floating_point():
            raise ValueError(
                f"{name}: got running statistics of dtype {buffer.dtype}, which cannot hold a "
                "fraction; expected floating-point buffers (such as buffer.float())"
            )


def back_up(layers: list[Layer]) -> Backup:
    """Return the layers with copies of their buffers."""
    return [
        (layer, *statistics)
        for layer, statistics in zip(layers, old_statistics(layers), strict=True)
    ]


def put_back(backup: Backup) -> None:
    """Write saved statistics into the buffers."""
    for layer, mean, var in backup:
        layer.use(mean, var)


def plain_name(name: str, model: nn.Module) -> str:
    """Return the name of a module without the prefixes of DDP and torch.compile."""
    name = name.replace("_orig_mod.", "").removesuffix("_orig_mod")
    while True:
        if isinstance(model, DistributedDataParallel):
            name, model = name.removeprefix("module").removeprefix("."), model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return name


def old_statistics(layers: list[Layer]) -> list[tuple[Tensor, Tensor]]:
    """Return copies of the buffers."""
    with torch.no_grad():
        return [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]
