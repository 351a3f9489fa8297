"""Models with places where a ReLU follows a layer, and with places that only look like it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Two layers and a ReLU, to be put together in a `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.other, self.relu = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.ReLU()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.deep = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
        self.writes = nn.ReLU(inplace=True)
        self.nothing = nn.Identity()


class Plain(Net):
    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn(x)) + torch.relu(self.other(x)) + F.relu(self.body(x))


class Methods(Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(x).relu_() + self.other(x).relu()


class Residuals(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.relu(self.nothing(self.bn(x)) + x)
        return self.relu(torch.add(y, self.other(y)))


class InPlace(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.deep(x)
        y += x
        return torch.relu(y).add(1)


class TwoLayers(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.body(x) + self.deep(x))


class EndsInNorm(Net):
    def forward(self, x: Tensor) -> Any:
        return self.nothing(self.deep(x))


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.others = EndsInNorm(), nn.ModuleList([EndsInNorm(), Plain()])

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.block(x) + x)
        y = F.relu(self.others[0](y))
        return self.others[1](y)


class KeywordArguments(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(input=x) + x, inplace=True)


class CalledTwice(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) + self.bn(x + 1)


class UsedTwice(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        return F.relu(y) - y


class CalledFromAbove(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Methods()

    def forward(self, x: Tensor) -> Any:
        return self.block(x) + self.block.bn(x) + self.block.other(x)


class Registered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Methods()
        self.norms = nn.ModuleList([self.block.bn, self.block.other])

    def forward(self, x: Tensor) -> Any:
        return self.block(x)


class WritesBetween(Net):
    def forward(self, x: Tensor) -> Any:
        x = x * 2
        y = self.bn(x)
        return F.relu(y + self.writes(x))


class WritesByOperator(Net):
    def forward(self, x: Tensor) -> Any:
        x = x * 2
        y = self.bn(x)
        x *= 3
        return F.relu(y + x)


class WritesByFunction(Net):
    def forward(self, x: Tensor) -> Any:
        x = x * 2
        y = self.bn(x)
        return F.relu(y + F.relu(x, True))


class AddsToTheOther(Net):
    def forward(self, x: Tensor) -> Any:
        y = x * 1
        z = y
        z += self.bn(x)
        return F.relu(z) + y


class Given(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x, x.abs()) + x)


class EndsInGiven(Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(x, x.abs())


class GivenInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = EndsInGiven()

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.block(x) + x)


class Doubled(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        return F.relu(y + y)


class Scaled(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(torch.add(self.bn(x), x, alpha=2))


class ReturnsTwo(Net):
    def forward(self, x: Tensor) -> Any:
        y, z = self._two(x)
        return F.relu(y) + z

    def _two(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn(x)
        return y, y


class ByMode(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) if self.training else self.bn(x)


class ByValue(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) if x.sum() > 0 else x


class Optional(Net):
    def forward(self, x: Tensor, twice: bool = False) -> Any:
        return F.relu(self.bn(x))


class Variadic(Net):
    def forward(self, *x: Tensor) -> Any:
        return F.relu(self.bn(x[0]))
