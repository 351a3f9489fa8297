"""The node in C++: what it launches, and what it leaves to the function in Python.

Triton's interpreter does what the node tells it, see :mod:`tests.interpreted_driver`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.autograd import node
from syncbn.autograd.function import SyncBatchNormFunction
from tests.interpreted_driver import Driver, kept
from tests.node import by_node, by_python, is_node, is_same, layer, no_gpu, step

pytestmark = no_gpu
IMAGES = (4, 6, 5, 3)
LAYOUTS = {
    "images": (IMAGES, torch.contiguous_format),
    "images, channels_last": (IMAGES, torch.channels_last),
    "volumes, channels_last": ((2, 3, 4, 3, 5), torch.channels_last_3d),
    "rows": ((40, 6), torch.contiguous_format),
    "one channel": ((9, 1, 2, 2), torch.contiguous_format),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"activation": "relu"},
    {"affine": False, "activation": "relu"},
    {"bias": False},
    {"track_running_stats": False},
    {"dtype": torch.bfloat16, "activation": "relu"},
]
Layer = syncbn.SyncBatchNorm


@pytest.fixture
def driver() -> Iterator[Driver]:
    with kept() as driver:
        yield driver


@pytest.mark.parametrize("residual", [None, "plain", "learned"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_to_the_bit(
    driver: Driver, options: dict[str, Any], layout: str, residual: str | None
) -> None:
    shape, memory_format = LAYOUTS[layout]
    dtype = options.get("dtype", torch.float32)
    # Each with memory of its own, which is aligned.
    x, r, dy = (
        torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format) for _ in range(3)
    )
    x.requires_grad_()
    r.requires_grad_(residual == "learned")
    given = x, dy, *([r] if residual else [])
    found = by_node(driver, layer(shape[1], **options), *given)
    assert is_same(found, by_python(layer(shape[1], **options), *given, times=3))


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"]], ids=str)
def test_gradients_that_are_not_needed(driver: Driver, frozen: list[str]) -> None:
    x, dy = torch.randn(2, *IMAGES)
    made, twin = layer(6), layer(6)
    for name in frozen:
        getattr(made, name).requires_grad_(False)
        getattr(twin, name).requires_grad_(False)
    given = x.requires_grad_(), dy
    assert is_same(by_node(driver, made, *given), by_python(twin, *given, times=3))


def _double(made: Layer, x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
    y = made(x, r)
    assert is_node(y)
    first = torch.autograd.grad(y, [x, r, made.weight], dy, create_graph=True)
    squares = torch.stack([(g * g).sum() for g in first]).sum()
    second = torch.autograd.grad(squares, [x, made.weight])
    return [*first, *second]


def _twice(made: Layer, x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
    y = made(x, r)
    assert is_node(y)
    inputs = [x, r, *made.parameters()]
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    return [*first, *torch.autograd.grad(y, inputs, dy * 2)]


def _where_only_parameters_learn(made: Layer, x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
    y = made(x.detach(), r.detach())
    assert is_node(y)
    return list(torch.autograd.grad(y, list(made.parameters()), dy))


def _of_one_input(made: Layer, x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    for t in (x, r, made.weight, made.bias):
        found += torch.autograd.grad(made(x, r), t, dy)
    return found


def _a_residual_that_is_the_input(made: Layer, x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
    y = made(x, x)
    assert is_node(y)
    return [y, *torch.autograd.grad(y, [x, made.weight], dy)]


def _without_a_graph(made: Layer, x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = made(x, r)
    with torch.inference_mode():
        z = made(x, r)
    assert not y.requires_grad
    return [y, z.clone()]


def _turned(t: Tensor) -> Tensor:
    is_image = t.ndim == 4
    return t.contiguous(memory_format=torch.channels_last) if is_image else t


def _hooks_of_saved_tensors(made: Layer, x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
    with saved_tensors_hooks(_turned, lambda t: t):
        y = made(x, r)
    assert is_node(y)
    return list(torch.autograd.grad(y, [x, r, made.weight], dy))


def _checkpoint(reentrant: bool) -> Callable[..., list[Tensor]]:
    def run(made: Layer, x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
        x, r = x.detach().requires_grad_(), r.detach().requires_grad_()
        made.zero_grad()
        y = checkpoint(lambda a, b: made(made(a, b), b), x, r, use_reentrant=reentrant)
        y.backward(dy)
        found = [y.detach(), x.grad, r.grad, made.weight.grad, *made.buffers()]
        return [t.clone() for t in found if t is not None]

    return run


def _after_a_hook(hook: Callable[[Tensor], Tensor]) -> Callable[..., list[Tensor]]:
    def run(made: Layer, x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
        y = made(x, r)
        assert is_node(y)
        y.register_hook(hook)
        return list(torch.autograd.grad(y, [x, r, made.weight], dy))

    return run


def _with_gaps(dy: Tensor) -> Tensor:
    return torch.stack([dy, -dy], 1)[:, 0]


def _unaligned(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def _negated(dy: Tensor) -> Tensor:
    found = torch.complex(dy, -dy).conj().imag
    assert found.is_neg()
    return found


def _another_dtype(which: int) -> Callable[..., list[Tensor]]:
    """Hooks that save memory may change what kernels would take for what it was."""

    def run(made: Layer, x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
        places = itertools.count()

        def packed(t: Tensor) -> Tensor:
            other = torch.int32 if t.dtype is torch.uint8 else torch.bfloat16
            return t.to(other) if next(places) == which else t

        with saved_tensors_hooks(packed, lambda t: t):
            y = made(x, r)
        assert is_node(y)
        return list(torch.autograd.grad(y, [x, r, *made.parameters()], dy))

    return run


def _as_numpy_has_it(dy: Tensor) -> Tensor:
    return torch.from_numpy(dy.numpy().copy())


def _anomaly(made: Layer, x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
    with torch.autograd.detect_anomaly(check_nan=True):
        return list(torch.autograd.grad(made(x, r), [x, r, made.weight], dy))


def _parameters_without_alignment(made: Layer, x: Tensor, r: Tensor, dy: Tensor) -> list[Tensor]:
    made.weight.data = _unaligned(made.weight.data)
    return step(made, x, dy, r)


WAYS: dict[str, Callable[[Layer, Tensor, Tensor, Tensor], list[Tensor]]] = {
    "gradients of gradients": _double,
    "twice": _twice,
    "of parameters": _where_only_parameters_learn,
    "of one": _of_one_input,
    "a residual that is the input": _a_residual_that_is_the_input,
    "without a graph": _without_a_graph,
    "hooks of saved tensors": _hooks_of_saved_tensors,
    "a checkpoint": _checkpoint(False),
    "a reentrant checkpoint": _checkpoint(True),
    "a weight of another dtype": _another_dtype(1),
    "a bias of another dtype": _another_dtype(2),
    "statistics of another dtype": _another_dtype(3),
    "a gate of another dtype": _another_dtype(4),
    "memory of NumPy": _after_a_hook(_as_numpy_has_it),
    "a gradient that lies otherwise": _after_a_hook(_turned),
    "a gradient without memory": _after_a_hook(lambda dy: dy[:1, :1, :1, :1].expand_as(dy)),
    "a gradient with gaps": _after_a_hook(_with_gaps),
    "a gradient that is not aligned": _after_a_hook(_unaligned),
    "a gradient that is a negative": _after_a_hook(_negated),
    "no gradient": _after_a_hook(lambda dy: torch._efficientzerotensor(dy.shape)),
    "parameters that are not aligned": _parameters_without_alignment,
    "an input that is not aligned": lambda made, x, r, dy: step(made, _unaligned(x), dy, r),
    "an input with gaps": lambda made, x, r, dy: step(made, _with_gaps(x), dy, r),
    "a negative": lambda made, x, r, dy: step(made, _negated(x), dy, r),
    "a residual that lies otherwise": lambda made, x, r, dy: step(made, x, dy, _turned(r)),
    "anomalies": _anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("way", WAYS)
def test_whatever_autograd_does(driver: Driver, way: str) -> None:
    """The node serves it or leaves it to Python; nobody can tell from what is found."""
    x, r, dy = (torch.randn(IMAGES).requires_grad_(learns) for learns in (True, True, False))
    made, twin = layer(6, activation="relu"), layer(6, activation="relu")
    for each in (made, twin):
        by_node(driver, each, x, dy, r)
    # Of what is new, launches are kept the first time.
    found = [WAYS[way](made, x, r, dy) for _ in range(2)]
    with patch.object(node, "_plans", lambda _: None), patch(f"{__name__}.is_node", lambda _: True):
        wanted = [WAYS[way](twin, x, r, dy) for _ in range(2)]
    assert all(map(is_same, found, wanted))
    assert is_same(list(made.buffers()), list(twin.buffers()))


def test_compiled_autograd(driver: Driver) -> None:
    """It has to know what a node keeps. The function's kernels cannot be traced, interpreted."""
    x, r, dy = (torch.randn(IMAGES).requires_grad_(learns) for learns in (True, True, False))
    made = layer(6, activation="relu")
    wanted = by_node(driver, made, x, dy, r)[1:5]
    y = made(x, r)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(dy)
    assert is_node(y)
    gradients = [x.grad, r.grad, made.weight.grad, made.bias.grad]
    assert is_same([t for t in gradients if t is not None], wanted)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_sees_the_function(driver: Driver) -> None:
    """Launches are no calls of torch, and torch.jit made a graph without them."""
    x = torch.randn(IMAGES)
    made = layer(6)
    with patch.object(SyncBatchNormFunction, "apply", side_effect=ZeroDivisionError):
        made(x)
        with pytest.raises(ZeroDivisionError):
            torch.jit.trace(made, (x,), check_trace=False)


def test_what_a_plan_depends_on(driver: Driver) -> None:
    """One layer, again and again, of inputs that differ in one thing each."""
    x, r, dy = (torch.randn(IMAGES) for _ in range(3))
    learned = x.clone().requires_grad_()
    ways: dict[str, Callable[[Layer], list[Tensor]]] = {
        "plain": lambda made: step(made, learned, dy),
        "residual": lambda made: step(made, learned, dy, r),
        "learned residual": lambda made: step(made, learned, dy, r.clone().requires_grad_()),
        "fewer": lambda made: step(made, x[:3].clone().requires_grad_(), dy[:3]),
        "wider": lambda made: step(
            made, x.reshape(4, 6, 3, 5).requires_grad_(), dy.reshape(4, 6, 3, 5)
        ),
        "channels_last": lambda made: step(made, _turned(x).requires_grad_(), _turned(dy)),
        "bfloat16": lambda made: step(made, x.bfloat16().requires_grad_(), dy.bfloat16()),
    }

    def run(made: Layer) -> list[Tensor]:
        found: list[Tensor] = []
        for relu in (None, "relu"):
            made.activation = relu
            for way in ways.values():
                found += way(made)
        return found

    made, twin = layer(6), layer(6)
    for _ in range(3):
        found = run(made)
    with patch.object(node, "_plans", lambda _: None):
        for _ in range(3):
            wanted = run(twin)
    assert is_same(found, wanted)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_it_depends_on_the_dtypes_of_numbers(driver: Driver, first: torch.dtype) -> None:
    dtypes = [first, torch.bfloat16, torch.float32]
    x, dy = torch.randn(IMAGES).bfloat16().requires_grad_(), torch.randn(IMAGES).bfloat16()
    for name in ("weight", "bias", "running_mean", "running_var"):
        made, twin = layer(6), layer(6)
        for dtype in dtypes:
            for each in (made, twin):
                old = getattr(each, name)
                old.data = old.data.to(dtype)
            found = [step(made, x, dy) for _ in range(3)][-1]
            assert is_same(found, by_python(twin, x, dy, times=3)), (name, dtype)


def test_cumulative_averages_and_batches_of_one(driver: Driver) -> None:
    x, dy = torch.randn(IMAGES, requires_grad=True), torch.randn(IMAGES)
    made, twin = layer(6, momentum=None), layer(6, momentum=None)
    found = [step(made, x, dy) for _ in range(3)][-1]
    assert is_same(found, by_python(twin, x, dy, times=3))
    for _ in range(3):
        with pytest.raises(ValueError, match="a single value per channel"):
            layer(6)(torch.randn(1, 6))


def test_floats_of_32_bits(driver: Driver) -> None:
    """As some versions of Triton compile what Python calls a float."""
    driver.floats = "fp32"
    x, dy = torch.randn(IMAGES, requires_grad=True), torch.randn(IMAGES)
    found = by_node(driver, layer(6, eps=0.3), x, dy)
    torch.testing.assert_close(found, by_python(layer(6, eps=0.3), x, dy, times=3))


def test_memory_that_is_shared_until_it_is_written(driver: Driver) -> None:
    """Averages were moved in what they had been cloned from."""
    x, dy = torch.randn(IMAGES, requires_grad=True), torch.randn(IMAGES)
    made, other = layer(6), torch.zeros(6)
    by_node(driver, made, x, dy)
    made.running_mean = torch._lazy_clone(other)
    step(made, x, dy)
    assert made.running_mean.any()
    assert not other.any()
