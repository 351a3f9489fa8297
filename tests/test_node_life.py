"""The node in C++ over time: streams, graphs, refusals, threads, memory, errors, the end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from syncbn.autograd import node
from syncbn.kernels.triton_launch import Launch
from tests.interpreted_driver import Driver, kept
from tests.node import STEP, by_node, by_python, is_node, is_same, layer, no_gpu, step
from tests.transports import ROOT

pytestmark = no_gpu
IMAGES = (4, 6, 5, 3)


@pytest.fixture
def driver() -> Iterator[Driver]:
    with kept() as driver:
        yield driver


@pytest.fixture
def given() -> tuple[Tensor, Tensor, Tensor]:
    x, r, dy = (torch.randn(IMAGES) for _ in range(3))
    return x.requires_grad_(), dy, r.requires_grad_()


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("what", ["another stream", "a graph", "one refusal", "two refusals"])
def test_where_there_are_no_launches_to_repeat_python_launches(
    driver: Driver, given: tuple[Tensor, Tensor, Tensor], what: str, part: str
) -> None:
    def changed() -> None:
        match what:
            case "another stream":
                driver.stream += 1
            case "a graph":
                driver.is_capturing = True
            case _:
                driver.refusals = 1 + (what == "two refusals")

    made, twin = layer(6, activation="relu"), layer(6, activation="relu")
    x, dy, r = given
    by_node(driver, made, *given)
    asked: list[str] = []
    launch = Launch.__call__

    def asking(self: Launch, *given: Any) -> None:
        asked.append(self.steps[0].kernel.__name__)
        launch(self, *given)

    with patch.object(Launch, "__call__", asking):
        if part == "forward":
            changed()
        y = made(x, r)
        assert asked == ["moments"] * (part == "forward")
        driver.is_capturing, driver.stream = False, 7
        if part == "backward":
            changed()
        found = torch.autograd.grad(y, [x, r, *made.parameters()], dy)
        assert asked == ["moments" if part == "forward" else "backward_reduce"]
    assert is_node(y)
    wanted = by_python(twin, *given, times=4)
    assert is_same([y.detach(), *found, *made.buffers()], wanted)
    driver.is_capturing, driver.stream = False, 7
    assert by_node(driver, made, *given)


def test_each_stream_has_launches_of_its_own(driver: Driver) -> None:
    x, dy = torch.randn(2, *IMAGES)
    made = layer(6)
    wanted = by_python(layer(6), x.requires_grad_(), dy, times=3)
    for stream in (7, 8, 7):
        driver.stream = stream
        made.load_state_dict(layer(6).state_dict())
        assert is_same(by_node(driver, made, x, dy), wanted)


def test_threads_take_turns(driver: Driver) -> None:
    """What the kernels of a pass tell each other is in memory of the stream, which they share."""
    rounds, together = 10, Barrier(2)
    x, dy = torch.randn(2, 64, 4, 8, 8)
    wanted = by_python(layer(4), x.requires_grad_(), dy)
    mine = [layer(4) for _ in range(2)]
    for made in mine:
        by_node(driver, made, x, dy)

    def run(made: Any) -> bool:
        together.wait()
        return all(is_same(step(made, x, dy)[:4], wanted[:4]) for _ in range(rounds))

    driver.launched.clear()
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, mine))
    firsts = driver.launched[::2], driver.launched[1::2]
    assert {*zip(*firsts, strict=True)} == {(STEP[0], STEP[1]), (STEP[2], STEP[3])}
    assert len(driver.launched) == 2 * rounds * len(STEP)


def test_threads_may_meet_a_new_kind_of_input_together(driver: Driver) -> None:
    """What one had been told was taken from it by another that was told the same."""
    number, together = 4, Barrier(4)
    before = sys.getswitchinterval()

    def run(made: Any) -> None:
        with torch.no_grad():
            for size in range(2, 42):
                x = torch.randn(size, 6, 2, 2)
                together.wait()
                for _ in range(3):
                    made(x)

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(number) as pool:
            list(pool.map(run, [layer(6) for _ in range(number)]))
    finally:
        sys.setswitchinterval(before)


KEEPS: dict[str, Callable[[Tensor], Any]] = {
    "the gradient": lambda g: g,
    "without its graph": lambda g: g.detach(),
    "a part": lambda g: g[1],
    "its storage": lambda g: g.untyped_storage(),
    "an array": lambda g: g.numpy(),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("least", ["small", "large"])
def test_dx_takes_the_memory_of_a_dy_that_nobody_has(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, least: str, gated: bool
) -> None:
    monkeypatch.setattr(node, "SMALL_ON_GPU", 4 * 360 + (least == "small"))
    made = layer(6, activation="relu")
    x, r = torch.randn(IMAGES, requires_grad=True), torch.randn(IMAGES)
    found: list[Tensor] = []
    for _ in range(3):
        driver.told.clear()
        y = made(x, r) if gated else made(x)
        found += torch.autograd.grad((y * y).sum(), x)
    assert is_node(y)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    reduce, elemt = driver.told[-2:]
    assert (elemt["dx_ptr"] == reduce["dy_ptr"]) == (least == "large")


@pytest.mark.parametrize("keep", KEEPS)
def test_what_somebody_has_of_dy_stays(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    monkeypatch.setattr(node, "SMALL_ON_GPU", 0)
    made, x = layer(6), torch.randn(IMAGES, requires_grad=True)
    kept_of_it: list[Any] = []
    copies: list[Any] = []

    def hook(dy: Tensor) -> None:
        copies.append(KEEPS[keep](dy.clone()))
        kept_of_it.append(KEEPS[keep](dy))

    for _ in range(3):
        y = made(x)
        y.register_hook(hook)
        (y * y).sum().backward()
    assert is_node(y)
    for found, wanted in zip(kept_of_it, copies, strict=True):
        assert _bytes(found) == _bytes(wanted)


def _bytes(kept_of_it: Any) -> bytes:
    match kept_of_it:
        case Tensor():
            return kept_of_it.numpy().tobytes()
        case torch.UntypedStorage():
            return bytes(kept_of_it.tolist())
    found: bytes = kept_of_it.tobytes()
    return found


def test_memory_of_others_stays(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array that was made a gradient is still NumPy's."""
    monkeypatch.setattr(node, "SMALL_ON_GPU", 0)
    made, x = layer(6), torch.randn(IMAGES, requires_grad=True)
    array = np.ones(IMAGES, dtype=np.float32)
    for _ in range(3):
        y = made(x)
        y.register_hook(lambda dy: torch.from_numpy(array))
        y.sum().backward()
    assert is_node(y)
    assert (array == 1).all()


def test_a_gradient_that_two_need_stays(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "SMALL_ON_GPU", 0)
    made, twin, x = layer(6), layer(6), torch.randn(IMAGES, requires_grad=True)
    for _ in range(3):
        # The sum gives both the same gradient.
        (found,) = torch.autograd.grad((made(x) + made(x * 2)).square().sum(), x)
    assert len(driver.launched) > 8
    with patch.object(node, "_plans", lambda _: None):
        for _ in range(3):
            (wanted,) = torch.autograd.grad((twin(x) + twin(x * 2)).square().sum(), x)
    assert torch.equal(found, wanted)


def test_errors_of_autograd(driver: Driver, given: tuple[Tensor, Tensor, Tensor]) -> None:
    x, dy, _ = given
    made = layer(6)
    by_node(driver, made, x, dy)
    y = made(x)
    y.backward(dy)
    with pytest.raises(RuntimeError, match="a second time"):
        y.backward(dy)
    h = x * 1
    y = made(h)
    h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)
    for name, buffer in made.named_buffers():
        z = x.sum() * buffer
        y = made(x)
        assert is_node(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()
        assert name in ("running_mean", "running_var", "num_batches_tracked")


def test_an_error_in_python_reaches_who_differentiates(
    driver: Driver, given: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, dy, _ = given
    y = layer(6)(x)
    assert is_node(y)
    with (
        patch.object(node.Steps, "backward", side_effect=ZeroDivisionError("of the tests")),
        pytest.raises(ZeroDivisionError, match="of the tests"),
    ):
        y.backward(dy)


def test_a_hook_that_fails_while_tensors_are_saved(driver: Driver) -> None:
    x, dy = torch.randn(2, *IMAGES)
    made = layer(6)
    by_node(driver, made, x.requires_grad_(), dy)

    def refuse(_: Tensor) -> None:
        raise ZeroDivisionError("of the tests")

    with (
        torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t),
        pytest.raises(ZeroDivisionError, match="of the tests"),
    ):
        made(x)
    assert by_node(driver, made, x, dy)


def test_inputs_of_more_sizes_than_are_kept(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "_MOST", 3)
    made = layer(6)
    graphs = []
    for size in (2, 3, 4, 5, 6):
        x = torch.randn(size, 6, 4, 4, requires_grad=True)
        dy = torch.randn(size, 6, 4, 4)
        wanted = by_python(layer(6), x, dy)
        assert is_same(by_node(driver, made, x, dy)[:4], wanted[:4])
        graphs.append((made(x), x, dy, wanted[1]))
    for y, x, dy, wanted_dx in graphs:
        assert is_node(y)
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], wanted_dx)


def test_what_a_node_keeps_ends_with_it(
    driver: Driver, given: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, dy, r = given
    made = layer(6, activation="relu")
    by_node(driver, made, *given)
    call: list[Any] = []
    normalize = node.normalize

    def noted(*arguments: Any) -> Tensor:
        call.append(arguments[-1])
        return normalize(*arguments)

    with patch.object(node, "normalize", noted):
        y = made(x, r)
    before = sys.getrefcount(call[0])
    y.backward(dy)
    del y
    after = sys.getrefcount(call[0])
    assert after == before - 1


PROGRAM = """
import torch
from tests import interpreter
interpreter.begin()
from tests.interpreted_driver import kept
from tests.node import is_node, layer, step
context = kept()
driver = context.__enter__()
made, x = layer(3), torch.randn(4, 3, 2, 2, requires_grad=True)
for _ in range(2):
    step(made, x, torch.ones(4, 3, 2, 2))
y = made(x)
print(is_node(y))
"""


def test_a_process_may_end_with_nodes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
