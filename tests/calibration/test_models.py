"""Models with shared, repeated or skipped layers, wrappers and unusual forwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn.bench.networks import resnet20
from tests.calibration.networks import (
    EXACT,
    METHODS,
    distance,
    images,
    network,
    run_batch,
    statistics,
)


class Recurrent(nn.Module):
    """A shared batch norm after each of three steps, and another one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.same_norm = self.norm
        self.last = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + 0.3 * torch.tanh(self.norm(self.step(x)) + 0.5)
        x = torch.relu(self.same_norm(self.step(x)))
        y: Tensor = self.last(x)
        return y


@pytest.mark.parametrize(
    ("method", "batch_size"), [("lockstep", 1), ("lockstep", 7), ("sequential", 7)]
)
def test_repeated_layer_is_fixed_point(method: str, batch_size: int) -> None:
    torch.manual_seed(0)
    net, x = Recurrent().double(), torch.randn(40, 4, dtype=torch.float64) + 1
    batches = x.split(batch_size)
    source: Any = iter(batches) if method == "lockstep" else batches
    report = syncbn.recalibrate(net, source, method=method)  # type: ignore[arg-type]
    seen: list[Tensor] = []
    net.eval()
    net.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net.last.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    last: list[Tensor] = []
    with torch.no_grad():
        net(x)
    values = torch.cat(seen)
    assert len(seen) == 3
    for layer, inputs in ((net.norm, values), (net.last, last[0])):
        torch.testing.assert_close(layer.running_mean, inputs.mean(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.running_var, inputs.var(0), rtol=1e-12, atol=0)
    assert [(entry.name, entry.samples) for entry in report.layers] == [("norm", 120), ("last", 40)]


def test_diverging_fixed_point_warns() -> None:
    class Oscillator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            z: Tensor = self.norm(-40 * y**3 + x)
            return z

    net, x = Oscillator().double(), torch.randn(50, 1, dtype=torch.float64) + 0.3
    with pytest.warns(UserWarning, match=r"norm: called more than once .* still changing after 50"):
        syncbn.recalibrate(net, x.split(5))


class DataDependent(nn.Module):
    """Model with a layer that only some batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm1d(3)  # registered first, called last
        self.first = nn.BatchNorm1d(3)
        self.dark = nn.BatchNorm1d(3)
        self.unused = nn.BatchNorm1d(3)
        self.end = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() < 0:
            x = self.dark(x.exp())
        y: Tensor = self.end(self.last(x * x))
        return y


def _bright_and_dark() -> list[Tensor]:
    return [torch.randn(8, 3, dtype=torch.float64) + sign * 3 for sign in (1, -1, 1, 1, -1)]


def test_sequential_with_data_dependent_layers() -> None:
    net, batches = DataDependent().double(), _bright_and_dark()
    report = syncbn.recalibrate(net, batches, method="sequential")
    first = torch.cat(batches)
    torch.testing.assert_close(net.first.running_mean, first.mean(0))
    net.eval()
    after = [net.first(batch) for batch in batches]
    dark = torch.cat([x.exp() for x in after if x.sum() < 0])
    torch.testing.assert_close(net.dark.running_mean, dark.mean(0))
    torch.testing.assert_close(net.dark.running_var, dark.var(0))
    last = torch.cat([(net.dark(x.exp()) if x.sum() < 0 else x).square() for x in after])
    torch.testing.assert_close(net.last.running_mean, last.mean(0))
    samples = {layer.name: layer.samples for layer in report.layers}
    assert samples == {"first": 40, "dark": 16, "last": 40, "end": 40}
    assert report.not_reached == ["unused"]
    assert net.unused.running_var.tolist() == [1, 1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("forward", [run_batch, None], ids=["own forward", "default"])
def test_lockstep_rejects_data_dependent_layers(forward: Any) -> None:
    net = DataDependent().double()
    with pytest.raises(ValueError, match=r"some 'last', and some 'dark'.*sequential"):
        syncbn.recalibrate(net, _bright_and_dark(), forward=forward)
    assert net.first.running_mean.tolist() == [0, 0, 0]  # type: ignore[union-attr]


class Growing:
    """Different number of batches in every pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield from images().split(4)[: self.passes]


class Exhausted:
    """Re-iterable, and empty from the second pass on."""

    def __init__(self) -> None:
        self.batches = iter(images().split(4))

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches


@pytest.mark.parametrize("source", [Growing, Exhausted])
def test_sequential_requires_repeatable_data(source: Any) -> None:
    net = network()
    before = statistics(net)
    with pytest.raises(ValueError, match=r"expected the same data in every pass"):
        syncbn.recalibrate(net, source(), method="sequential")
    assert distance(statistics(net), before) == 0.0


def test_sequential_restores_loader_generator() -> None:
    def loader() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(5)
        return DataLoader(TensorDataset(images()), 4, shuffle=True, generator=generator)

    net, expected = network(), network()
    syncbn.recalibrate(net, loader(), method="sequential", num_samples=10)
    syncbn.recalibrate(expected, loader(), num_samples=10)
    assert distance(statistics(net), statistics(expected)) < 1e-12


def test_lockstep_rejects_inference_mode() -> None:
    net = network()

    def forward(model: nn.Module, x: Tensor) -> None:
        with torch.inference_mode():
            model(x)

    with pytest.raises(ValueError, match=r"^1: called within torch.inference_mode\(\)"):
        syncbn.recalibrate(net, images().split(4), forward=forward)
    assert not torch.is_inference_mode_enabled()
    expected = network()
    syncbn.recalibrate(net, images().split(4), forward=forward, method="sequential")
    syncbn.recalibrate(expected, [images()])
    assert distance(statistics(net), statistics(expected)) < 1e-12


def test_sdpa_backend_is_restored() -> None:
    seen: list[bool] = []

    def forward(model: nn.Module, x: Tensor) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            model(x)
            seen.append(torch.backends.cuda.flash_sdp_enabled())

    syncbn.recalibrate(network(), images().split(4), forward=forward)
    assert seen == [False] * 9  # six batches, one profile, two single passes
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


class Squeezed(nn.Module):
    """Model that drops the batch dimension of a single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mean((2, 3), keepdim=True).squeeze())  # type: ignore[no-any-return]


def test_model_without_single_sample_support() -> None:
    net: Any = Squeezed().double()
    report = syncbn.recalibrate(net, images().split(12))
    assert report.layers[0].samples == 24
    torch.testing.assert_close(net.norm.running_mean, images().mean((0, 2, 3)))


@pytest.mark.parametrize("method", [*EXACT, "pooled"])
def test_statistics_overflow_buffers(method: Any) -> None:
    net: Any = nn.Sequential(nn.BatchNorm2d(3)).half()
    x = images() * 1000
    with pytest.raises(ValueError, match=r"^0: .* beyond the range of its buffers.*float16"):
        syncbn.recalibrate(net, [x.half()], method=method)
    assert net[0].running_var.tolist() == [1, 1, 1]


def test_sequential_rejects_unordered_layers() -> None:
    class EitherWay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x)) if x.sum() > 0 else self.a(self.b(x))
            return y

    with pytest.raises(ValueError, match=r"[ab] and [ab]: their order differs between batches"):
        syncbn.recalibrate(EitherWay(), [torch.ones(3, 2), -torch.ones(3, 2)], method="sequential")


@pytest.mark.parametrize("method", METHODS)
def test_compiled_models(method: Any) -> None:
    plain, whole, part = network(), network(), network()
    part[3] = torch.compile(part[3], backend="eager")  # type: ignore[assignment]
    wrapped: Any = torch.compile(whole, backend="eager")
    names = [
        list(syncbn.recalibrate(net, images().split(6), method=method).between())
        for net in (plain, wrapped, part)
    ]
    assert distance(statistics(whole), statistics(plain)) == 0.0
    assert names[0] == names[1] == names[2]


class Masked(nn.Module):
    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.norm, self.by_name = syncbn.SyncBatchNorm1d(3), by_name

    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, 0] > 0
        y: Tensor = self.norm(x, mask=mask) if self.by_name else self.norm(x, None, mask)
        return y


@pytest.mark.parametrize(("method", "by_name"), [("lockstep", False), ("pooled", True)])
def test_masks_raise(method: Any, by_name: bool) -> None:
    net = Masked(by_name)
    message = "norm: called with a mask; calibration supports unmasked inputs"
    with pytest.raises(ValueError, match=message):
        syncbn.recalibrate(net, [torch.randn(4, 3)], method=method)
    assert torch.equal(net.norm.get_buffer("running_var"), torch.ones(3))


@pytest.mark.parametrize("method", ["lockstep", "pooled"])
def test_fused_models(method: Any) -> None:
    plain, fused = (syncbn.convert_sync_batchnorm(resnet20()).double() for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    assert len(syncbn.fuse(fused).fused) == 19
    for net in (plain, fused):
        syncbn.recalibrate(net, images().split(6), method=method)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())


def test_name_of_a_compiled_layer() -> None:
    alone: Any = torch.compile(nn.BatchNorm2d(3).double(), backend="eager")
    assert list(syncbn.recalibrate(alone, [images()]).between()) == [""]


def test_sequential_counts_calls_that_the_first_batch_lacks() -> None:
    """Regression: repeated layers were looked for in the first batch, and later calls ignored."""

    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Any:
            for _ in range(3 if x[0, 0] > 0 else 1):
                x = x + 0.2 * torch.relu(self.norm(self.step(x)))
            return self.last(x)

    batches = list(torch.randn(6, 16, 4, dtype=torch.float64))
    for batch in batches:
        batch[0, 0] = -1.0 if batch is batches[0] else 1.0
    means = []
    for data in (batches, batches[1:] + batches[:1]):
        torch.manual_seed(1)
        net = Recursive().double()
        report = syncbn.recalibrate(net, data, method="sequential")
        counts = [(layer.name, layer.samples) for layer in report.layers]
        assert counts == [("norm", 16 * (1 + 5 * 3)), ("last", 16 * 6)]
        means.append(net.norm.running_mean)
    torch.testing.assert_close(means[0], means[1], rtol=1e-10, atol=1e-10)


def test_sequential_counts_calls_after_a_layer_that_only_the_first_forward_reaches() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.step = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x: Tensor) -> Any:
            self.calls += 1
            x = self.first(x) if self.calls == 1 else x
            return self.norm(x + 0.2 * self.step(self.norm(x)))

    report = syncbn.recalibrate(Stateful(), list(torch.randn(4, 16, 4)), method="sequential")
    assert [(layer.name, layer.samples) for layer in report.layers] == [("norm", 2 * 4 * 16)]
