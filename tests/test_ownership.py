"""dx may take dy's memory where nobody else has it, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.device import ON_GPU, on_cpu, seeded
from tests.kernel_cases import needs_cpp

# Large enough for its memory to be worth asking for.
SHAPE = (4, 3, 1200, 1200) if ON_GPU else (4, 3, 80, 80)
Keep = Callable[[Tensor], Any]
Read = Callable[[Any], Tensor]

# What a hook may keep of a gradient, and how it is read later.
KEPT: dict[str, tuple[Keep, Read]] = {
    "the gradient": (lambda g: g, lambda g: g),
    "without its graph": (lambda g: g.detach(), lambda g: g),
    "a view": (lambda g: g.view(-1), lambda g: g),
    "a part": (lambda g: g[1], lambda g: g),
    "its storage": (
        lambda g: g.untyped_storage(),
        lambda s: torch.empty(0).set_(s),
    ),
    **({} if ON_GPU else {"an array": (lambda g: g.numpy(), torch.from_numpy)}),
    "a DLPack capsule": (lambda g: g.__dlpack__(), torch.from_dlpack),
}


def layer() -> syncbn.SyncBatchNorm2d:
    return syncbn.SyncBatchNorm2d(3)


def images(requires_grad: bool = True) -> Tensor:
    generator = seeded(0)
    return torch.randn(SHAPE, generator=generator).requires_grad_(requires_grad)


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_of_a_gradient_that_nobody_has_takes_its_memory(layout: str) -> None:
    memory_format = getattr(torch, layout.replace("contiguous", "contiguous_format"))
    addresses = []
    x = images(requires_grad=False).contiguous(memory_format=memory_format).requires_grad_()
    # A hook that looks and keeps nothing.
    h = x * 1
    h.register_hook(lambda g: addresses.append(g.data_ptr()))
    y = layer()(h)
    y.register_hook(lambda g: addresses.append(g.data_ptr()))
    (y * y).sum().backward()
    assert addresses[0] == addresses[1]


@pytest.mark.parametrize("kept", KEPT)
def test_what_a_hook_keeps_stays(kept: str) -> None:
    keep, read = KEPT[kept]
    seen: list[Any] = []
    copies: list[Tensor] = []
    y = layer()(images())

    def hook(gradient: Tensor) -> None:
        copies.append(keep(gradient.clone()))
        seen.append(keep(gradient))

    y.register_hook(hook)
    (y * y).sum().backward()
    assert torch.equal(read(seen[0]), read(copies[0]))


@on_cpu
def test_memory_of_numpy_stays() -> None:
    """A tensor that wraps an array is counted as if nobody else had it."""
    array = np.ones(SHAPE, dtype=np.float32)
    y = layer()(images())
    y.register_hook(lambda _: torch.from_numpy(array))
    (y * y).sum().backward()
    assert (array == 1).all()


WATCHED = """
import sys, torch, syncbn
from torch.utils._python_dispatch import TorchDispatchMode

class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        kept.append((args, result))
        return result

def trace(frame, event, argument):
    kept.append(dict(frame.f_locals))
    return trace

def step(keep):
    x = torch.randn(4, 3, 80, 80, requires_grad=True)
    y = syncbn.SyncBatchNorm2d(3)(x)
    y.register_hook(keep)
    (y * y).sum().backward()

kept, seen = [], []
if sys.argv[1] == "recorder":
    with Recorder():
        step(lambda g: None)
else:
    sys.settrace(trace)
    step(lambda g: None)
    sys.settrace(None)
assert kept
kept.clear()
step(lambda g: seen.extend([g, g.clone()]))
assert torch.equal(*seen)
"""


@pytest.mark.parametrize("by", ["recorder", "tracer"])
def test_who_watches_the_first_gradient_does_not_count_later(by: str) -> None:
    """What is normal is found out once; with references of a recorder, later ones were missed."""
    done = subprocess.run([sys.executable, "-c", WATCHED, by], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_user_passes_stays() -> None:
    y, dy = layer()(images()), torch.randn(SHAPE)
    before = dy.clone()
    y.backward(dy)
    assert torch.equal(dy, before)


def test_what_is_asked_for_stays() -> None:
    y = layer()(images())
    y.retain_grad()
    (y * y).sum().backward()
    assert y.grad is not None
    assert torch.equal(y.grad, 2 * y.detach())
    x = images()
    y = layer()(x)
    dy, _ = torch.autograd.grad((y * y).sum(), [y, x])
    assert torch.equal(dy, 2 * y.detach())


@pytest.mark.parametrize("order", [0, 1])
def test_a_gradient_that_goes_two_ways_stays(order: int) -> None:
    """An addition hands the same gradient to both of its inputs."""
    gradients = []
    for norm in (layer(), nn.BatchNorm2d(3)):
        x = images()
        h = x * 2
        y = norm(h) + h if order else h + norm(h)
        (y * y).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_parts_of_one_gradient_stay_apart() -> None:
    gradients = []
    for norm in (layer(), nn.BatchNorm2d(3)):
        x = images()
        torch.cat([norm(x * 2), norm(x.exp())]).pow(3).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def _keep(kept: list[Tensor], _: nn.Module, dx: Any, dy: Any) -> None:
    kept.extend([*dx, *dy])


def test_hooks_of_modules_get_what_they_should() -> None:
    seen: list[list[Tensor]] = []
    for norm in (layer(), nn.BatchNorm2d(3)):
        kept: list[Tensor] = []
        norm.register_full_backward_hook(partial(_keep, kept))
        y = norm(images())
        (y * y).sum().backward()
        seen.append(kept)
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_backward_twice_through_one_graph() -> None:
    x = images()
    y = layer()(x)
    loss = (y * y).sum()
    loss.backward(retain_graph=True)
    assert x.grad is not None
    first = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * first)
