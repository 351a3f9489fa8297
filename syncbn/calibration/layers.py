"""The layers to calibrate: found, read and written."""

from __future__ import annotations

from dataclasses import dataclass

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


def find_layers(model: nn.Module) -> list[Layer]:
    """Return the batch-norm layers that have running statistics, each once.

    Raises:
        ValueError: there are none; one follows a rule of :mod:`syncbn.inference`; one is lazy and
            has no size yet; one always normalizes with the statistics of its batch, whose outputs
            and all that follows depend on the batch size.
    """
    found: list[Layer] = []
    for full_name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        name = _name_in_the_plain_model(full_name, model)
        if (rule := module._modules.get("_syncbn_rule")) is not None:
            raise ValueError(
                f"{name}: follows {rule} instead of its running statistics; expected a layer "
                "without a rule (syncbn.inference.revert_inference takes it away)"
            )
        if isinstance(module.running_mean, nn.UninitializedBuffer):
            raise ValueError(
                f"{name}: got a lazy layer without a size; run one batch through the model first"
            )
        if module.running_mean is None or module.running_var is None:
            raise ValueError(
                f"{name}: got a layer with track_running_stats=False, which has no population "
                "statistics and makes those of later layers depend on the batch size; expected "
                "running_mean and running_var"
            )
        found.append(Layer(len(found), name, module))
    if not found:
        raise ValueError(
            f"got {type(model).__name__} without a batch-norm layer; expected nn.BatchNorm*, "
            "nn.SyncBatchNorm or syncbn layers in it"
        )
    return found


def put_back(layers: list[Layer], statistics: list[tuple[Tensor, Tensor]]) -> None:
    """Write statistics into the buffers."""
    for layer, (mean, var) in zip(layers, statistics, strict=True):
        layer.use(mean, var)


def _name_in_the_plain_model(name: str, model: nn.Module) -> str:
    """Return a name without what DDP and torch.compile put into it."""
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
