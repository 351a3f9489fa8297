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
    """Convolutions with batch norms, and a shortcut."""

    def __init__(self, main: list[nn.Module], shortcut: nn.Module) -> None:
        super().__init__()
        self.main, self.shortcut = nn.Sequential(*main), shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        return F.relu(self.main(x) + shortcut, inplace=True)


def resnet20() -> nn.Module:
    """Return ResNet-20 (section 4.2) for 32x32 images and 10 classes, with 19 batch norms."""
    blocks = [*_conv(3, 16, 3), nn.ReLU(inplace=True)]
    for inputs, width in pairwise([16, 16, 16, 16, 32, 32, 32, 64, 64, 64]):
        shortcut = nn.Identity() if inputs == width else _PaddedShortcut(width - inputs)
        main = [*_conv(inputs, width, 3, width // inputs), nn.ReLU(inplace=True)]
        blocks.append(_Block([*main, *_conv(width, width, 3)], shortcut))
    return nn.Sequential(*blocks, *_head(64, 10))


def resnet50() -> nn.Module:
    """Return ResNet-50 (table 1; stride in the 3x3 convolution), with 53 batch norms."""
    blocks = [*_conv(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    inputs = 64
    for width, count in {64: 3, 128: 4, 256: 6, 512: 3}.items():
        for block in range(count):
            stride, outputs = 2 if width > 64 and block == 0 else 1, 4 * width
            main = [*_conv(inputs, width, 1), nn.ReLU(inplace=True)]
            main += [*_conv(width, width, 3, stride), nn.ReLU(inplace=True)]
            projection = _conv(inputs, outputs, 1, stride) if block == 0 else [nn.Identity()]
            blocks.append(_Block([*main, *_conv(width, outputs, 1)], nn.Sequential(*projection)))
            inputs = outputs
    return nn.Sequential(*blocks, *_head(inputs, 1000))


#: Networks of benchmarks, by name.
NETWORKS = {"resnet20": resnet20, "resnet50": resnet50}


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


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def _head(inputs: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
