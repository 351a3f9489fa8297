"""Each choice of `norm`, and the names in checkpoints."""

from __future__ import annotations

import pytest
import torch
from config import Arch, ModelConfig, NormConfig, NormKind
from norm import FrozenBatchNorm2d, apply_norm
from resnet import ResNet, build_resnet
from torch import nn

import syncbn
from tests.ranks import Ranks

CPU = torch.device("cpu")


def small(name: Arch = Arch.resnet18) -> ResNet:
    return build_resnet(ModelConfig(name, 4, False, None), 3, 10, seed=0)


@pytest.mark.parametrize(
    ("kind", "device", "layer"),
    [
        (NormKind.local, "cpu", nn.BatchNorm2d),
        (NormKind.sync, "cpu", syncbn.SyncBatchNorm2d),
        (NormKind.torch_sync, "cuda", nn.SyncBatchNorm),
        (NormKind.frozen, "cpu", FrozenBatchNorm2d),
    ],
)
def test_every_layer_is_replaced_and_the_state_kept(
    kind: NormKind, device: str, layer: type[nn.Module]
) -> None:
    net = apply_norm(small(), NormConfig(kind), torch.device(device))
    kinds = [type(m) for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [layer] * 20
    expected = small().state_dict()
    assert list(net.state_dict()) == list(expected)
    assert all(torch.equal(net.state_dict()[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "layers", "residuals"), [(Arch.resnet20, 19, 9), (Arch.resnet18, 17, 8)]
)
def test_fused_layers_take_relus_and_residuals(name: Arch, layers: int, residuals: int) -> None:
    plain = apply_norm(small(name), NormConfig(NormKind.sync), CPU).double()
    fused = apply_norm(small(name), NormConfig(NormKind.sync, fused=True), CPU).double()
    norms = [m for m in fused.modules() if isinstance(m, syncbn.SyncBatchNorm)]
    assert [getattr(m, "activation", None) for m in norms].count("relu") == layers
    calls = []
    for norm in norms:
        norm.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
        )
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x))
    assert sum("residual" in kwargs for kwargs in calls) == residuals


def test_frozen_layers_stay_frozen_in_training_mode() -> None:
    """`model.train()` at the start of an epoch must not thaw them."""
    net, x = small(), torch.randn(8, 3, 32, 32)
    net(torch.randn(8, 3, 32, 32))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    frozen = apply_norm(net, NormConfig(NormKind.frozen), CPU).train()
    trained = frozen(x)
    trained.sum().backward()
    assert torch.equal(trained, frozen.eval()(x))
    assert all(torch.equal(buffer, before[name]) for name, buffer in frozen.named_buffers())
    assert frozen.get_submodule("layer1.0.bn1").weight.grad is None
    assert net.conv1.weight.grad is not None


def _first_mean(rank: int, group: int) -> torch.Tensor | str:
    try:
        net = apply_norm(small(), NormConfig(NormKind.group, group), CPU).train()
    except ValueError as error:
        return str(error)
    generator = torch.Generator().manual_seed(rank)
    net(torch.randn(2, 3, 32, 32, generator=generator))
    mean = net.get_submodule("bn1").running_mean
    assert isinstance(mean, torch.Tensor)
    return mean


def test_group_shares_statistics_within_its_ranks(two_ranks: Ranks) -> None:
    apart, together = (two_ranks.run(_first_mean, size) for size in (1, 2))
    assert not torch.allclose(apart[0], apart[1])
    assert torch.equal(together[0], together[1])
    torch.testing.assert_close(together[0], (apart[0] + apart[1]) / 2)
    assert all("3" in error for error in two_ranks.run(_first_mean, 3))
