"""ResNets (He et al. 2015), as in examples/resnet/resnet.py, and their training step.

The package cannot import the examples.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Small, so that losses stay near their start for any number of steps.
_LEARNING_RATE = 1e-3


class _PaddedShortcut(nn.Module):
    """Every second pixel, with zero channels added on both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.padding = channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class _Block(nn.Module):
    """Two convolutions and a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, outputs // inputs, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else _PaddedShortcut(outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, and a shortcut."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.shortcut(x), inplace=True)


def resnet20() -> nn.Module:
    """Return ResNet-20 (section 4.2) for 32x32 images and 10 classes, with 19 batch norms."""
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [_Block(*pair) for pair in pairwise(widths)]
    return nn.Sequential(*stem, *blocks, *_head(64, 10))


def resnet50() -> nn.Module:
    """Return ResNet-50 (table 1; stride in the 3x3 convolution), with 53 batch norms."""
    stem = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
    blocks: list[nn.Module] = [nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    inputs = 64
    for width, count in {64: 3, 128: 4, 256: 6, 512: 3}.items():
        for block in range(count):
            stride = 2 if width > 64 and block == 0 else 1
            blocks.append(_Bottleneck(inputs, width, 4 * width, stride))
            inputs = 4 * width
    return nn.Sequential(*stem, *blocks, *_head(inputs, 1000))


def training_step(
    model: nn.Module, images: Tensor, half: torch.dtype | None = None
) -> Callable[[], None]:
    """Return a function that takes a step of SGD with momentum.

    Args:
        model: network that returns logits, shape ``[N, classes]``.
        images: input, shape ``[N, 3, height, width]``.
        half: dtype of autocast, or None for float32.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9)
    labels = torch.arange(len(images), device=images.device) % 10

    def step() -> None:
        with torch.autocast(images.device.type, half, enabled=half is not None):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _head(inputs: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
