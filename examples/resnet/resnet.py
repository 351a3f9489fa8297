"""Residual networks (He et al. 2015) with the parameter names of torchvision.

Two families share one class:

* ResNet-18/34/50 for ImageNet: a 7x7 stem with max-pooling, four stages, and 1x1-convolution
  shortcuts where the shape changes ("option B"; stride on the 3x3 convolution of a bottleneck).
  Names and shapes equal torchvision's, so its checkpoints load unchanged.
* ResNet-20 for small images, section 4.2 of the paper: a 3x3 stem, three stages, and shortcuts
  without parameters that subsample and pad channels with zeros ("option A", as the paper does for
  CIFAR: 269,722 parameters; option B would make it 272,474 and not be the network of the paper).
"""

import torch
import torch.nn.functional as F
from config import Arch, ModelConfig
from torch import Tensor, nn


class ZeroPadShortcut(nn.Module):
    """Every second pixel of ``x``, with zero channels added on both sides."""

    def __init__(self, extra_channels: int) -> None:
        super().__init__()
        self.before = extra_channels // 2
        self.after = extra_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to ``[N, C + extra, ceil(H/2), ceil(W/2)]``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, inputs, H, W]`` to ``[N, planes, H/stride, W/stride]``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + shortcut)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; ``4 * planes`` output channels."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv1x1(inputs, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, inputs, H, W]`` to ``[N, 4 * planes, H/stride, W/stride]``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + shortcut)
        return out


class ResNet(nn.Module):
    """A residual network.

    Args:
        block: the residual unit.
        depths: blocks in each stage; three or four stages.
        width: channels of the first stage; each further stage doubles them.
        channels: channels of the input images.
        num_classes: outputs.
        small_images: the CIFAR form (3x3 stem, no pooling, parameter-free shortcuts) instead of
            the ImageNet form.
        zero_init_residual: start every block as an identity (Goyal et al. 2017, section 5.1).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        *,
        width: int,
        channels: int,
        num_classes: int,
        small_images: bool,
        zero_init_residual: bool,
    ) -> None:
        super().__init__()
        self.conv1 = (
            conv3x3(channels, width)
            if small_images
            else nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, padding=1)

        inputs, stages = width, []
        for index, depth in enumerate(depths):
            planes, stride = width * 2**index, 1 if index == 0 else 2
            blocks: list[nn.Module] = []
            for stride_here in [stride, *[1] * (depth - 1)]:
                shortcut = _shortcut(inputs, planes * block.expansion, stride_here, small_images)
                blocks.append(block(inputs, planes, stride_here, shortcut))
                inputs = planes * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages[:3]
        self.layer4 = stages[3] if len(stages) == 4 else nn.Identity()
        self.fc = nn.Linear(inputs, num_classes)
        self._init_weights(zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, channels, H, W]`` to logits ``[N, num_classes]``, of the same dtype."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits

    def _init_weights(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.weight)


def _shortcut(inputs: int, outputs: int, stride: int, small_images: bool) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    if small_images:
        return ZeroPadShortcut(outputs - inputs)
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


_LAYOUTS: dict[Arch, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    Arch.resnet18: (BasicBlock, (2, 2, 2, 2)),
    Arch.resnet34: (BasicBlock, (3, 4, 6, 3)),
    Arch.resnet50: (Bottleneck, (3, 4, 6, 3)),
    Arch.resnet20: (BasicBlock, (3, 3, 3)),
}


def build_resnet(cfg: ModelConfig, channels: int, num_classes: int, seed: int) -> ResNet:
    """Build a network whose initial weights depend on nothing but ``seed`` and the architecture.

    Args:
        cfg: architecture, width and initialization.
        channels: channels of the input images.
        num_classes: outputs.
        seed: seed of the initial weights; the same on every rank.

    Returns:
        The network on the CPU, float32, with `nn.BatchNorm2d` layers.
    """
    # A fork, so that building a network leaves the caller's random numbers alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block, depths = _LAYOUTS[cfg.name]
        return ResNet(
            block,
            depths,
            width=cfg.width,
            channels=channels,
            num_classes=num_classes,
            small_images=cfg.name is Arch.resnet20,
            zero_init_residual=cfg.zero_init_residual,
        )
