"""Networks match the papers, with the names of published checkpoints."""

from __future__ import annotations

import pytest
import torch
from config import Arch, ModelConfig
from resnet import BasicBlock, Bottleneck, ResNet, build_resnet


def build(name: Arch, *, zero_init: bool = False, channels: int = 3, seed: int = 0) -> ResNet:
    imagenet = name is not Arch.resnet20
    cfg = ModelConfig(name, 64 if imagenet else 16, zero_init, None)
    return build_resnet(cfg, channels, 1000 if imagenet else 10, seed)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Parameter counts documented by torchvision.
        (Arch.resnet18, 11_689_512),
        (Arch.resnet34, 21_797_672),
        (Arch.resnet50, 25_557_032),
        # Shortcuts without parameters; 272,474 with 1x1 convolutions.
        (Arch.resnet20, 269_722),
    ],
)
def test_parameter_counts_are_the_published_ones(name: Arch, count: int) -> None:
    assert sum(p.numel() for p in build(name).parameters()) == count


def test_resnet50_names_and_shapes_match_torchvision() -> None:
    """Built from the description of the network, not from the code under test."""
    expected: dict[str, tuple[int, ...]] = {"fc.weight": (1000, 2048), "fc.bias": (1000,)}

    def conv(layer: str, *shape: int, norm: str) -> None:
        expected[f"{layer}.weight"] = shape
        for kind in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{norm}.{kind}"] = shape[:1]
        expected[f"{norm}.num_batches_tracked"] = ()

    conv("conv1", 64, 3, 7, 7, norm="bn1")
    inputs = 64
    for stage, (planes, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            conv(f"{name}.conv1", planes, inputs, 1, 1, norm=f"{name}.bn1")
            conv(f"{name}.conv2", planes, planes, 3, 3, norm=f"{name}.bn2")
            conv(f"{name}.conv3", 4 * planes, planes, 1, 1, norm=f"{name}.bn3")
            if block == 0:
                shortcut = f"{name}.downsample"
                conv(f"{shortcut}.0", 4 * planes, inputs, 1, 1, norm=f"{shortcut}.1")
            inputs = 4 * planes
    net = build(Arch.resnet50)
    assert {name: tuple(t.shape) for name, t in net.state_dict().items()} == expected
    # The stride is on the 3x3 convolution, as in torchvision and unlike in the paper.
    strides = [net.get_submodule(f"layer2.0.conv{i}").stride for i in (1, 2, 3)]
    assert strides == [(1, 1), (2, 2), (1, 1)]
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 1000)


def test_resnet20_has_three_stages_of_halving_size() -> None:
    net = build(Arch.resnet20, channels=1)
    x = net.relu(net.bn1(net.conv1(torch.randn(2, 1, 32, 32))))
    shapes = [tuple((x := stage(x)).shape[1:]) for stage in (net.layer1, net.layer2, net.layer3)]
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_padded_shortcut_keeps_old_channels_in_the_middle() -> None:
    shortcut = build(Arch.resnet20).get_submodule("layer2.0.downsample")
    x = torch.randn(2, 16, 5, 4)
    y = shortcut(x)
    assert y.shape == (2, 32, 3, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].eq(0).all()
    assert y[:, 24:].eq(0).all()


@pytest.mark.parametrize(
    ("name", "count", "channels"), [(Arch.resnet20, 9, 64), (Arch.resnet50, 16, 2048)]
)
def test_zero_init_starts_blocks_as_identities(name: Arch, count: int, channels: int) -> None:
    x = torch.rand(1, channels, 4, 4)
    for zero_init in (True, False):
        net = build(name, zero_init=zero_init).eval()
        blocks = [m for m in net.modules() if isinstance(m, BasicBlock | Bottleneck)]
        assert len(blocks) == count
        assert torch.equal(blocks[-1](x), x) == zero_init


def test_initial_weights_depend_on_the_seed_alone() -> None:
    """Two ranks, or two runs to compare, must start from equal weights whatever ran before."""
    first = build(Arch.resnet20, seed=3)
    torch.rand(7)
    before = torch.get_rng_state()
    second = build(Arch.resnet20, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.conv1.weight, build(Arch.resnet20, seed=4).conv1.weight)
