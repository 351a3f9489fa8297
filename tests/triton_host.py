"""Time what the host does for layers on a GPU, without one: by the driver that launches nothing.

``python -m tests.triton_host`` prints microseconds of a layer, forward and backward, in a chain of
layers; ours and torch's, whose own kernels for a tiny input on the CPU take the place of launches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from syncbn import SyncBatchNorm2d, kernels
from syncbn.bench.timing import interleave
from syncbn.kernels import Kernel, triton
from syncbn.nn import module
from tests.triton_launches import active, build

SHAPE, LAYERS, ROUNDS, BURST = (2, 16, 4, 4), 20, 30, 10
# Of a ResNet-50, by what follows: nothing, a ReLU, an addition and a ReLU.
PLACES = {"": 4, " + ReLU": 33, " + addition + ReLU": 16}
BY = "theirs", "ours"


def choose(name: str, x: Tensor, *others: Tensor | None) -> Kernel:
    """Do what :func:`syncbn.kernels.choose` does for a GPU, and take the Triton kernels."""
    assert name == "auto"
    assert not torch.compiler.is_compiling()
    assert kernels._is_plain(x, others)
    assert not kernels.missing_triton()
    assert not kernels._triton().why_not(x)
    return kernels._triton()


def chain(ours: bool, after: str) -> Callable[[], object]:
    """Return forward and backward of layers, one after the other, as one call."""
    channels = SHAPE[1]
    make: Callable[[int], nn.Module] = nn.BatchNorm2d
    if ours:
        make = partial(SyncBatchNorm2d, activation="relu" if "ReLU" in after else None)
    layers = nn.ModuleList(make(channels) for _ in range(LAYERS))
    x, dy = torch.randn(2, *SHAPE)
    inputs = [x.requires_grad_(), *layers.parameters()]
    relu = nn.ReLU(inplace=True)

    def forward() -> Tensor:
        y: Tensor = x
        for layer in layers:
            if ours:
                y = layer(y, x) if "addition" in after else layer(y)
            else:
                y = layer(y)
                y = y.add_(x) if "addition" in after else y
                y = relu(y) if "ReLU" in after else y
        return y

    return lambda: torch.autograd.grad(forward(), inputs, dy)


def measured(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return microseconds of a layer, medians of rounds in which all take their turns."""
    times = interleave(calls, ROUNDS, BURST, lambda: None)
    return {name: float(t.median()) / LAYERS * 1e6 for name, t in times.items()}


def main() -> None:
    """Measure all alone, and ours in a group of two, whose messages nobody sends."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        calls = {f"{name}{after}": chain(name == "ours", after) for after in PLACES for name in BY}
        with (
            active(),
            patch.object(triton, "_why_none", lambda *_: None),
            patch.object(module, "choose", choose),
        ):
            median = measured(calls)
            dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
            together = measured(calls)
            dist.destroy_process_group()
    for after in PLACES:
        theirs, ours = (median[f"{name}{after}"] for name in BY)
        print(
            f"nn.BatchNorm2d{after}: {theirs:.1f} us, ours {ours:.1f} us, {ours / theirs:.2f}; "
            f"in a group of two {together[f'ours{after}']:.1f} us"
        )
    theirs, ours = (
        sum(count * median[f"{name}{after}"] for after, count in PLACES.items()) for name in BY
    )
    print(f"the layers of a ResNet-50: {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
