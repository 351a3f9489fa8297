"""Loops of Accelerate on two ranks: a MONAI network of volumes, and a network of point clouds."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import syncbn
from tests.integrations.forked import run_on_two_ranks
from tests.integrations.support import (
    BATCH,
    CLASSES,
    LEARNING_RATE,
    PointNet,
    check_training,
    initialize,
    make_dataset,
    state,
)


def make_volume_resnet() -> Any:
    nets: Any = import_module("monai.networks.nets")
    return nets.ResNet(
        block="basic",
        layers=[1, 1, 1, 1],
        block_inplanes=[4, 8, 8, 8],
        spatial_dims=3,
        n_input_channels=1,
        conv1_t_size=3,
        num_classes=CLASSES,
    )


#: A network, and the shape of a sample.
NETWORKS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "MONAI": (make_volume_resnet, (1, 12, 12, 12)),
    "points": (PointNet, (3, 6)),
}


def _train(rank: int, name: str) -> Any:
    make, shape = NETWORKS[name]
    accelerator = import_module("accelerate").Accelerator(cpu=True)
    net = syncbn.convert_sync_batchnorm(initialize(make))
    model, optimizer, loader = accelerator.prepare(
        net,
        torch.optim.SGD(net.parameters(), LEARNING_RATE),
        DataLoader(make_dataset(*shape), BATCH),
    )
    assert accelerator.num_processes == 2
    assert type(model).__name__ == "DistributedDataParallel"
    losses = []
    for x, labels in loader:
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses, state(net)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_ranks_equal_one_process(name: str, tmp_path: Path) -> None:
    import_module("accelerate")
    make, shape = NETWORKS[name]
    initialize(make)  # imports MONAI, for the ranks to inherit it
    check_training(run_on_two_ranks(_train, tmp_path, name), make, make_dataset(*shape))
