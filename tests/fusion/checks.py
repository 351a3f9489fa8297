"""Comparisons of fused models; in a separate module for ranks to import quickly."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import syncbn
from tests.device import seeded
from tests.fusion.models import Parent


def _outcome(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return outputs in training and evaluation, gradients and running statistics."""
    model.zero_grad()
    y = model.train()(x)
    y = getattr(y, "logits", y)
    (y.square().sum() + y.sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        evaluated = model.eval()(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {
        "y": y,
        "gradients": gradients,
        "evaluated": getattr(evaluated, "logits", evaluated),
        "state": state,
    }


def check_fused(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Fuse a copy, compare it, undo it, compare again; return the fused operations."""
    syncbn.convert_sync_batchnorm(model.double())
    other = copy.deepcopy(model)
    fusion = syncbn.fuse(other)
    fused = dict(fusion.fused)
    torch.testing.assert_close(_outcome(other, x), _outcome(model, x))
    torch.testing.assert_close(_outcome(copy.deepcopy(other), x), _outcome(model, x))
    _outcome(other, x)
    for _ in range(2):
        fusion.undo()
        assert fusion.fused == {}
    assert [*map(type, other.modules())] == [*map(type, model.modules())]
    assert vars(other).keys() == vars(model).keys()
    torch.testing.assert_close(_outcome(other, x), _outcome(model, x))
    return fused


def train_on_rank(rank: int, fused: bool, sharded: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model: Any = syncbn.convert_sync_batchnorm(Parent()).double()
    if fused:
        assert len(syncbn.fuse(model).fused) == 5
    if sharded:
        device = torch.get_default_device().type
        fully_shard(model, mesh=init_device_mesh(device, (dist.get_world_size(),)))
    generator = seeded(rank)
    x = torch.randn([4, 0, 3][rank], 3, generator=generator, dtype=torch.float64)
    y = model(x)
    (y.square().sum() + y.sum()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if sharded:
        gradients = [gradient.full_tensor() for gradient in gradients]
    return {"y": y.detach(), "gradients": gradients, "buffers": list(model.buffers())}
