"""Models in which a ReLU follows a layer, or seems to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Layers and ReLUs for a `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.other, self.relu = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.ReLU()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.deep = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
        self.last = nn.BatchNorm1d(3)
        self.writes = nn.ReLU(inplace=True)
        self.nothing = nn.Identity()
        self.empty = nn.Sequential()


class Plain(Net):
    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn(x)) + torch.relu(self.other(x)) + F.relu(self.body(x))


class Methods(Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(x).relu_() + self.other(x).relu()


class Residuals(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.relu(self.nothing(self.bn(x)) + self.empty(x))
        return self.relu(torch.add(y, self.other(y)))


class OtherResiduals(Net):
    """Additions in place, by keyword and with broadcasting; one of two layers takes the other."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(1, 3))

    def forward(self, x: Tensor) -> Any:
        y = self.deep(x)
        y += x
        y = torch.relu(y).add(1)
        y = F.relu(self.bn(input=y) + y, inplace=True)
        y = F.relu(self.offset + self.other(y))
        return F.relu(self.body(y) + self.last(y))


class Activations(nn.Module):
    """Every activation as a module and as a function, some of them with a residual."""

    def __init__(self) -> None:
        super().__init__()
        modules = nn.ReLU6(), nn.LeakyReLU(0.2), nn.SiLU(True), nn.Hardswish(), nn.GELU()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(3), m) for m in modules))
        self.norms = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(6))

    def forward(self, x: Tensor) -> Any:
        x = F.relu6(self.norms[0](self.blocks(x)))
        x = F.leaky_relu(self.norms[1](x), 0.3, inplace=True)
        x = F.leaky_relu(self.norms[2](x) + x)
        x = F.silu(self.norms[3](x) + x)
        return F.gelu(self.norms[5](F.hardswish(self.norms[4](x))))


class OtherActivations(nn.Module):
    """Activations and slopes that layers do not have."""

    def __init__(self) -> None:
        super().__init__()
        modules = nn.GELU("tanh"), nn.LeakyReLU(-0.2), nn.ELU(), nn.PReLU(), nn.Softplus()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(3), m) for m in modules))
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Any:
        return F.gelu(self.bn(self.blocks(x)), approximate="tanh")


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


class Unfusable(Net):
    """Layers that are called twice, used twice, scaled and added to themselves."""

    def forward(self, x: Tensor) -> Any:
        y = self.other(x)
        y = F.relu(y) - y + F.relu(torch.add(self.body(x), x, alpha=2))
        z = self.last(x)
        return F.relu(z + z) + F.relu(self.bn(x)) + self.bn(x + 1) + y


class CalledFromAbove(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Methods()

    def forward(self, x: Tensor) -> Any:
        return self.block(x) + self.block.bn(x) + self.block.other(x)


class RegisteredTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Methods()
        self.norms = nn.ModuleList([self.block.bn, self.block.other])

    def forward(self, x: Tensor) -> Any:
        return self.block(x)


class Writes(Net):
    """Writes to the input of a layer before the addition: by a module, operator and function."""

    def forward(self, x: Tensor) -> Any:
        x = x * 2
        y = self.bn(x)
        y = F.relu(y + self.writes(x)) - 1
        z = self.other(y)
        y *= 3
        z = F.relu(z + y) - 1
        w = self.last(z)
        return F.relu(w + F.relu(z, True))


class AddsInPlaceToAlias(Net):
    def forward(self, x: Tensor) -> Any:
        y = x * 1
        z = y
        z += self.bn(x)
        return F.relu(z) + y


class CallWithResidual(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x, x.abs()) + x)


class EndsInCallWithResidual(Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(x, x.abs())


class ParentOfCallWithResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = EndsInCallWithResidual()

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.block(x) + x)


class ReturnsTwo(Net):
    def forward(self, x: Tensor) -> Any:
        y, z = self._two(x)
        return F.relu(y) + z

    def _two(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn(x)
        return y, y


class BranchesOnMode(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) if self.training else self.bn(x)


class BranchesOnValue(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) if x.sum() > 0 else x


class OptionalArgument(Net):
    def forward(self, x: Tensor, twice: bool = False) -> Any:
        return F.relu(self.bn(x))


class VariadicArguments(Net):
    def forward(self, *x: Tensor) -> Any:
        return F.relu(self.bn(x[0]))


class TorchvisionBlock(Net):
    """Block in the style of torchvision: a helper, and a child that may be None."""

    downsample: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.downsample = None
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        """Map ``[N, 3]`` to itself."""
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Any:
        identity = x
        out: Tensor = self.bn(x)
        out = self.relu(out)
        out = self.other(torch.flatten(out, 1))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out * self.scale


class BranchWritesInPlace(Net):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.shortcut = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        x = x * 1
        y = self.branch(x)
        return F.relu(y + self.shortcut(x))


class TorchvisionDownsample(TorchvisionBlock):
    def __init__(self) -> None:
        super().__init__()
        self.downsample = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


NOT_FUSED: list[type[nn.Module]] = [
    *(Unfusable, CalledFromAbove, RegisteredTwice, AddsInPlaceToAlias, ReturnsTwo),
    *(CallWithResidual, ParentOfCallWithResidual, BranchWritesInPlace),
]
