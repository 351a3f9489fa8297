"""Networks with state between their layers, and data for them."""

from __future__ import annotations

from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EQUAL = "match single passes"
REPLACED = "sequential replaced it"
#: Sizes of batches. Lockstep coalesces the first two.
SIZES = EVEN, UNEVEN, LARGE = (6,) * 5, (6, 6, 6, 6, 5), (40, 33)


def features(sizes: tuple[int, ...] = (6,) * 5) -> list[Tensor]:
    """Return batches of features ``[N, 4]`` of different scales."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(size, 4, generator=generator, dtype=torch.float64) * (i + 1) + i
        for i, size in enumerate(sizes)
    ]


class Layers(nn.Module):
    """Three batch-norm layers between linear ones; subclasses keep state between the layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.inner, self.norms, strict=True):
            x = self.between(norm(linear(x)))
        return x

    def between(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class SkipOnTheModule(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.skip = x
        return super().forward(x)

    def between(self, x: Tensor) -> Tensor:
        return x + self.skip


class CacheOfAForward(Layers):
    """Cache filled by the first layer and cleared at the end of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.cache.setdefault("scale", x.std())
        try:
            return super().forward(x)
        finally:
            self.cache.pop("scale", None)

    def between(self, x: Tensor) -> Tensor:
        return x * self.cache["scale"] if "scale" in self.cache else x


class QueueOfSkips(Layers):
    """A forward that ends early would leave its input to the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: deque[Tensor] = deque()

    def forward(self, x: Tensor) -> Tensor:
        self.queue.extend([x, x + 1, x + 2])
        return super().forward(x)

    def between(self, x: Tensor) -> Tensor:
        return x + self.queue.popleft()


class RandomAndSkip(SkipOnTheModule):
    """Random numbers must not hide the state."""

    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x + self.skip, 0.0) + 1e-12 * torch.rand_like(x)


STATEFUL = [SkipOnTheModule, CacheOfAForward, QueueOfSkips, RandomAndSkip]
