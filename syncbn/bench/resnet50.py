"""ResNet-50 (He et al. 2015, table 1; stride in the 3x3 convolution): 53 layers of batch norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 1000
_BLOCKS = (3, 4, 6, 3)
_WIDTH, _EXPANSION = 64, 4


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * width
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


def resnet50() -> nn.Module:
    """Return the network, which maps ``[N, 3, H, W]`` to logits ``[N, 1000]``.

    It has 25,557,032 parameters.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, _WIDTH, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(_WIDTH),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    inputs = _WIDTH
    for stage, blocks in enumerate(_BLOCKS):
        width = _WIDTH << stage
        for block in range(blocks):
            layers.append(_Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = _EXPANSION * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))
