"""The networks and data sets of this example for `syncbn-recalibrate`.

See `configs/example/resnet.yaml`.
"""

from dataclasses import replace
from typing import Any

import data as data_sets
import torch
import torch.distributed as dist
from config import DataConfig, ModelConfig
from omegaconf import OmegaConf
from resnet import build_resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader

from syncbn import RankInfo

Loader = DataLoader[tuple[Tensor, Tensor]]


def network(data: Any, **model: Any) -> nn.Module:
    """Return a network, its weights not loaded; a collective.

    Args:
        data: arguments of `training_batches`; they define the numbers of channels and classes.
        **model: the keys of a file in `configs/model`.
    """
    images, _ = data_sets.load(_data_config(data), seed=0)
    cfg: ModelConfig = _typed(ModelConfig, model)
    return build_resnet(cfg, images.channels, images.num_classes, seed=0)


def training_batches(**data: Any) -> Loader:
    """Return this rank's share of the training set, each image once; a collective.

    Args:
        **data: the keys of a file in `configs/data`.
    """
    return _batches(data, 0, data["batch_size"])


def test_batches(data: Any) -> Loader:
    """Return this rank's share of the test set, each image once; a collective.

    Args:
        data: arguments of `training_batches`.
    """
    return _batches(data, 1, data["eval_batch_size"])


def _batches(data: Any, part: int, batch_size: int) -> Loader:
    cfg = replace(_data_config(data), eval_batch_size=batch_size)
    info = RankInfo(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"))
    return data_sets.eval_batches(data_sets.load(cfg, seed=0)[part], cfg, info)


def _data_config(data: Any) -> DataConfig:
    cfg: DataConfig = _typed(DataConfig, {k: v for k, v in data.items() if k != "_target_"})
    return cfg


def _typed(kind: type, keys: Any) -> Any:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), keys))
