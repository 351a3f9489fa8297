"""The layer on a single rank, compared with nn.BatchNorm."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Case, batch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

import syncbn
from syncbn.kernels.base import RunningStats
from syncbn.kernels.reference import update_running_stats
from syncbn.moments import Moments
from tests.kernel_cases import KERNELS, device_of

pytestmark = pytest.mark.layers

PAIRS: list[tuple[Callable[..., nn.Module], Callable[..., nn.Module], tuple[int, ...]]] = [
    (syncbn.SyncBatchNorm1d, nn.BatchNorm1d, (6, 4)),
    (syncbn.SyncBatchNorm1d, nn.BatchNorm1d, (6, 4, 5)),
    (syncbn.SyncBatchNorm2d, nn.BatchNorm2d, (3, 4, 5, 6)),
    (syncbn.SyncBatchNorm3d, nn.BatchNorm3d, (2, 4, 3, 2, 3)),
    (syncbn.SyncBatchNorm, nn.BatchNorm3d, (2, 4, 3, 2, 3)),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 0.7, "eps": 1e-2},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Return output and gradients of one training step."""
    x = x.clone().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    return [y, *gradients]


@pytest.mark.parametrize(("kind", "torch_kind", "shape"), PAIRS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_single_rank_equals_torch(
    kind: Callable[..., nn.Module],
    torch_kind: Callable[..., nn.Module],
    shape: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    layer = kind(shape[1], dtype=torch.float64, **options)
    reference = torch_kind(shape[1], dtype=torch.float64, **options)
    for _ in range(3):
        x, dy = torch.randn(2, *shape, dtype=torch.float64)
        torch.testing.assert_close(
            step(layer, x, dy), step(reference, x, dy), rtol=1e-10, atol=1e-12
        )
    state = reference.state_dict()
    torch.testing.assert_close(layer.state_dict(), state, rtol=1e-12, atol=0)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), reference.eval()(x), rtol=1e-12, atol=1e-12)
    # State dicts of both load into both.
    reference.load_state_dict(layer.state_dict())
    layer.load_state_dict(state)


def test_checkpoints_from_before_num_batches_tracked_load() -> None:
    old = nn.BatchNorm2d(3).state_dict()
    del old["num_batches_tracked"], old._metadata  # type: ignore[attr-defined]
    syncbn.SyncBatchNorm2d(3).load_state_dict(old)


def test_classes_are_found_as_batch_norm_but_not_as_torch_sync_batch_norm() -> None:
    """DistributedDataParallel refuses nn.SyncBatchNorm on CPU."""
    layer = syncbn.SyncBatchNorm2d(3)
    assert isinstance(layer, nn.BatchNorm2d)
    assert isinstance(syncbn.SyncBatchNorm1d(3), nn.BatchNorm1d)
    assert isinstance(syncbn.SyncBatchNorm3d(3), nn.BatchNorm3d)
    assert not isinstance(layer, nn.SyncBatchNorm)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_an_inplace_relu_may_follow(kernel: str, layout: str) -> None:
    """Autograd refuses to change a view that a function returned, and ResNets use such a ReLU."""
    layer = syncbn.SyncBatchNorm2d(4).to(device_of(kernel))
    layer.impl = kernel
    x, dy = (t.to(device_of(kernel)) for t in batch(Case(((3, 4, 8, 8),), layout=layout), 0))
    x.requires_grad_()
    y = layer(x)
    expected = y.detach().clone().relu()
    torch.relu_(y).backward(dy)
    assert torch.equal(y, expected)
    assert x.grad is not None


def test_constructor_has_the_arguments_of_torch() -> None:
    actual = inspect.signature(syncbn.SyncBatchNorm.__init__).parameters
    expected = inspect.signature(nn.SyncBatchNorm.__init__).parameters
    assert list(actual) == [*expected, "activation", "negative_slope"]
    for name, parameter in expected.items():
        assert actual[name].default == parameter.default
        assert actual[name].kind == parameter.kind


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_value_is_copied_to_the_host(options: dict[str, Any]) -> None:
    """Meta tensors have no values to read."""
    layer = syncbn.SyncBatchNorm2d(3, device="meta", **options)
    x = torch.randn(4, 3, 5, 5, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_the_default_device_does_not_matter() -> None:
    """Regression: kernels allocated there, which crashed on a device without memory."""
    x = torch.randn(4, 6, 5, 5)
    for values in (x, x[:, ::2], x[..., ::2], x.to(memory_format=torch.channels_last)[:, 1:4]):
        values.requires_grad_()
        layer = syncbn.SyncBatchNorm2d(values.shape[1])
        with torch.device("meta"):
            y = layer(values)
            (dx,) = torch.autograd.grad(y.square().sum(), values)
        torch.testing.assert_close(y, F.batch_norm(values, None, None, training=True))
        assert dx.device == x.device


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_tensor_subclasses_as_parameters_take_the_reference(name: str) -> None:
    """Shards or quantized values have no memory: the kernel was selected by the input alone."""
    x = torch.randn(4, 3, 5, 5)
    affine: dict[str, Any] = {"weight": torch.rand(3), "bias": torch.rand(3)}
    expected = F.batch_norm(x, None, None, training=True, **affine)
    affine[name] = TwoTensor(affine[name], affine[name])
    y = syncbn.sync_batch_norm(x, None, None, training=True, **affine)
    assert isinstance(y, TwoTensor)
    torch.testing.assert_close(y.a, expected)


@pytest.mark.parametrize("value", [3.0, float("inf"), float("nan")])
def test_a_single_value_reaches_no_buffer(value: float) -> None:
    """CPU refuses such a batch; on CUDA, where reading the count would stall, this keeps it out."""
    mean, var = torch.zeros(2), torch.ones(2)
    one, sums = torch.tensor(1.0).double(), torch.full((2,), value).double()
    update_running_stats(Moments(one, sums, sums.square()), RunningStats(mean, var, None, 0.1))
    assert torch.equal(mean, torch.zeros(2))
    assert torch.equal(var, torch.ones(2))


@pytest.mark.parametrize("value", [1e3 + 0.1, 1e4 + 0.1, 1e6 + 0.3])
def test_gradient_of_a_constant_channel(value: float) -> None:
    layer, reference = syncbn.SyncBatchNorm2d(2), nn.BatchNorm2d(2).double()
    x, dy = torch.full((4, 2, 6, 6), value), torch.randn(4, 2, 6, 6)
    dx = step(layer, x, dy)[1]
    expected = step(reference, x.double(), dy.double())[1]
    torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(layer.running_var, torch.full((2,), 0.9))


def test_frozen_input_and_parameters_get_no_gradient() -> None:
    layer = syncbn.SyncBatchNorm2d(3)
    layer.bias.requires_grad_(False)
    layer(torch.randn(4, 3, 2, 2)).sum().backward()
    assert layer.bias.grad is None
    assert layer.weight.grad is not None
