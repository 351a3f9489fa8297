"""Stand-ins for layers of libraries that do not install on CPU, with their names and attributes.

Each forward is the published one for a single process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def named(name: str) -> Any:
    """Decorate a class to have the qualified name of the library's class."""

    def rename(kind: Any) -> Any:
        kind.__module__, _, kind.__qualname__ = name.rpartition(".")
        return kind

    return rename


@named("detectron2.layers.batch_norm.NaiveSyncBatchNorm")
class NaiveSyncBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.0


class _Plain(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


@named("horovod.torch.sync_batch_norm.SyncBatchNorm")
class HorovodSyncBatchNorm(_Plain):
    pass


@named("apex.parallel.optimized_sync_batchnorm.SyncBatchNorm")
class ApexSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Takes its group, and the options of a fused kernel, as attributes."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.process_group, self.channel_last, self.fuse_relu = None, False, False

    def forward(self, input: Tensor, z: Tensor | None = None) -> Tensor:
        y = super().forward(input) if z is None else super().forward(input) + z
        return y.relu() if self.fuse_relu else y

    def _check_input_dim(self, input: Tensor) -> None:
        pass


@named("fairscale.experimental.nn.sync_batchnorm.SyncBatchNorm")
class FairscaleSyncBatchNorm(_Plain):
    pass


class _Tensors(nn.Module):
    """The tensors of a batch norm in a module that is none of torch's."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, counts: bool) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, 1e-5, 0.1
        self.affine = True
        self.weight = nn.Parameter(torch.randn(num_features))
        self.bias = nn.Parameter(torch.randn(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        if counts:
            self.track_running_stats = True
            self.register_buffer("num_batches_tracked", torch.tensor(0))

    def normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        mean, var, options = self.running_mean, self.running_var, (self.training, self.momentum)
        return F.batch_norm(x, mean, var, weight, self.bias, *options, self.eps)


@named("mmcv.ops.sync_bn.SyncBatchNorm")
class MmcvSyncBatchNorm(_Tensors):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, counts=True)
        self.group, self.group_size, self.stats_mode = None, 1, "default"

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        return self.normalize(input, self.weight)


@named("inplace_abn.abn.InPlaceABN")
class InPlaceABN(_Tensors):
    def __init__(
        self, num_features: int, activation: str = "leaky_relu", activation_param: float = 0.01
    ) -> None:
        super().__init__(num_features, counts=False)
        self.activation, self.activation_param = activation, activation_param

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalize(x, self.weight.abs() + self.eps)
        match self.activation:
            case "leaky_relu":
                return F.leaky_relu(y, self.activation_param)
            case "elu":
                return F.elu(y, self.activation_param)
        return y
