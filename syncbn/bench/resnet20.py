"""ResNet-20 for 32x32 images (He et al. 2015, section 4.2): what the training benchmarks train.

The package cannot import `examples/resnet/resnet.py`, which has more families and options; the
numbers of parameters agree.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
_BLOCKS_PER_STAGE = 3
_STAGES = (16, 32, 64)


class _Shortcut(nn.Module):
    """Every second pixel, with zero channels added on both sides."""

    def __init__(self, more_channels: int) -> None:
        super().__init__()
        self.padding = more_channels // 2

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
        self.shortcut = nn.Identity() if inputs == outputs else _Shortcut(outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet20() -> nn.Module:
    """Return the network, which maps ``[N, 3, 32, 32]`` to logits ``[N, 10]``.

    It has 19 layers of ``nn.BatchNorm2d`` and 269,722 parameters.
    """
    width = _STAGES[0]
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    for outputs in _STAGES:
        for _ in range(_BLOCKS_PER_STAGE):
            layers.append(_Block(width, outputs))
            width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))
