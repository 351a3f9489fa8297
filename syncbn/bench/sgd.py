"""A training step, as the benchmarks of whole networks take them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Small, for the losses to stay where they began, however many steps there are.
_LEARNING_RATE = 1e-3


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, half: torch.dtype | None = None
) -> Callable[[], None]:
    """Return a function that takes a step of SGD with momentum; each call takes another.

    Args:
        model: returns logits, shape ``[N, classes]``.
        images: shape ``[N, 3, height, width]``.
        labels: shape ``[N]``, int64.
        half: a dtype for autocast, or None for float32.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9)

    def step() -> None:
        with torch.autocast(images.device.type, half, enabled=half is not None):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
