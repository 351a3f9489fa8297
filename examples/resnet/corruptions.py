"""Image corruptions: noise and low contrast."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

#: Called with images ``[N, C, H, W]`` and the corruption strength.
Corruption: TypeAlias = Callable[[Tensor, float], Tensor]


def noise(images: Tensor, deviation: float) -> Tensor:
    """Return images with Gaussian noise, the same at every call.

    Args:
        images: ``[N, C, H, W]``.
        deviation: standard deviation of the noise, in units of the images.
    """
    generator = torch.Generator().manual_seed(0)
    return images + deviation * torch.randn(images.shape, generator=generator)


def low_contrast(images: Tensor, loss: float) -> Tensor:
    """Return images drawn towards their own mean.

    Args:
        images: ``[N, C, H, W]``.
        loss: lost share of the contrast, from 0 to 1.
    """
    return torch.lerp(images, images.mean((1, 2, 3), keepdim=True), loss)
