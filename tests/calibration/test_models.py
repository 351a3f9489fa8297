"""Models with shared, repeated or skipped layers, wrappers and unusual forwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import syncbn
from syncbn.bench.networks import resnet20
from tests.calibration.networks import (
    EXACT,
    METHODS,
    Model,
    compute_population_stats,
    distance,
    images,
    network,
    require_error,
    run_batch,
    statistics,
)


def _run_recurrent(net: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        x = x + 0.3 * torch.tanh(net.norm(net.step(x)) + 0.5)
    y: Tensor = net.last(torch.relu(net.same_norm(net.step(x))))
    return y


@pytest.mark.parametrize(
    ("method", "batch_size"), [("lockstep", 1), ("lockstep", 7), ("sequential", 7)]
)
def test_repeated_layer_is_fixed_point(method: Any, batch_size: int) -> None:
    norm, x = nn.BatchNorm1d(4), torch.randn(40, 4, dtype=torch.float64) + 1
    modules = {"step": nn.Linear(4, 4), "norm": norm, "same_norm": norm}
    net: Any = Model(_run_recurrent, **modules, last=nn.BatchNorm1d(4)).double()
    batches = x.split(batch_size)
    source: Any = iter(batches) if method == "lockstep" else batches
    report = syncbn.recalibrate(net, source, method=method)
    seen: list[Tensor] = []
    last: list[Tensor] = []
    net.eval()
    net.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net.last.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.no_grad():
        net(x)
    assert len(seen) == 3
    for layer, inputs in ((net.norm, torch.cat(seen)), (net.last, last[0])):
        torch.testing.assert_close(layer.running_mean, inputs.mean(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.running_var, inputs.var(0), rtol=1e-12, atol=0)
    assert [(entry.name, entry.samples) for entry in report.layers] == [("norm", 120), ("last", 40)]


def test_diverging_fixed_point_warns() -> None:
    def run(net: Any, x: Tensor) -> Any:
        return net.norm(-40 * net.norm(x) ** 3 + x)

    net, x = Model(run, norm=nn.BatchNorm1d(1)).double(), torch.randn(50, 1).double() + 0.3
    with pytest.warns(UserWarning, match=r"norm: called more than once .* still changing after 50"):
        syncbn.recalibrate(net, x.split(5))


def _run_data_dependent(net: Any, x: Tensor) -> Any:
    x = net.first(x)
    if x.sum() < 0:
        x = net.dark(x.exp())
    return net.end(net.last(x * x))


def _data_dependent() -> tuple[Any, list[Tensor]]:
    """Return a model with a layer that only some batches reach, and batches."""
    names = ("last", "first", "dark", "unused", "end")  # last is registered before first
    net = Model(_run_data_dependent, **{name: nn.BatchNorm1d(3) for name in names}).double()
    return net, [torch.randn(8, 3, dtype=torch.float64) + sign * 3 for sign in (1, -1, 1, 1, -1)]


def test_sequential_with_data_dependent_layers() -> None:
    net, batches = _data_dependent()
    report = syncbn.recalibrate(net, batches, method="sequential")
    torch.testing.assert_close(net.first.running_mean, torch.cat(batches).mean(0))
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
    assert net.unused.running_var.tolist() == [1, 1, 1]


@pytest.mark.parametrize("forward", [run_batch, None], ids=["own forward", "default"])
def test_lockstep_rejects_data_dependent_layers(forward: Any) -> None:
    net, batches = _data_dependent()
    require_error(net, r"some 'last', and some 'dark'.*sequential", batches, forward=forward)


def test_sequential_requires_repeatable_data() -> None:
    class Exhausted:
        """Re-iterable, and empty from the second pass on."""

        batches = iter(images().split(4))

        def __iter__(self) -> Iterator[Tensor]:
            yield from self.batches

    message = "expected the same data in every pass"
    require_error(network(), message, Exhausted(), method="sequential")


def test_lockstep_rejects_inference_mode() -> None:
    def forward(model: nn.Module, x: Tensor) -> None:
        with torch.inference_mode():
            model(x)

    net, batches = network(), images().split(4)
    message = r"^1: called within torch.inference_mode\(\)"
    require_error(net, message, batches, forward=forward)
    assert not torch.is_inference_mode_enabled()
    syncbn.recalibrate(net, batches, forward=forward, method="sequential")
    assert distance(statistics(net), compute_population_stats(network(), images())) < 1e-12


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


def test_model_without_single_sample_support() -> None:
    """The model drops the batch dimension of a single sample."""

    def run(net: Any, x: Tensor) -> Any:
        return net.norm(x.mean((2, 3), keepdim=True).squeeze())

    net: Any = Model(run, norm=nn.BatchNorm1d(3)).double()
    report = syncbn.recalibrate(net, images().split(12))
    assert report.layers[0].samples == 24
    torch.testing.assert_close(net.norm.running_mean, images().mean((0, 2, 3)))


@pytest.mark.parametrize("method", [*EXACT, "pooled"])
def test_statistics_overflow_buffers(method: Any) -> None:
    net, x = nn.Sequential(nn.BatchNorm2d(3)).half(), images() * 1000
    message = r"^0: .* beyond the range of its buffers.*float16"
    require_error(net, message, [x.half()], method=method)


def test_sequential_rejects_unordered_layers() -> None:
    def run(net: Any, x: Tensor) -> Any:
        return net.b(net.a(x)) if x.sum() > 0 else net.a(net.b(x))

    net = Model(run, a=nn.BatchNorm1d(2), b=nn.BatchNorm1d(2))
    batches = [torch.ones(3, 2), -torch.ones(3, 2)]
    message = "[ab] and [ab]: their order differs between batches"
    require_error(net, message, batches, method="sequential")


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


def test_name_of_a_compiled_layer() -> None:
    alone: Any = torch.compile(nn.BatchNorm2d(3).double(), backend="eager")
    assert list(syncbn.recalibrate(alone, [images()]).between()) == [""]


@pytest.mark.parametrize(("method", "by_name"), [("lockstep", False), ("pooled", True)])
def test_masks_raise(method: Any, by_name: bool) -> None:
    def run(net: Any, x: Tensor) -> Any:
        mask = x[:, 0] > 0
        return net.norm(x, mask=mask) if by_name else net.norm(x, None, mask)

    message = "norm: called with a mask; calibration supports unmasked inputs"
    net = Model(run, norm=syncbn.SyncBatchNorm1d(3))
    require_error(net, message, [torch.randn(4, 3)], method=method)


@pytest.mark.parametrize("method", ["lockstep", "pooled"])
def test_fused_models(method: Any) -> None:
    plain, fused = (syncbn.convert_sync_batchnorm(resnet20()).double() for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    assert len(syncbn.fuse(fused).fused) == 19
    for net in (plain, fused):
        syncbn.recalibrate(net, images().split(6), method=method)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())


def test_sequential_counts_calls_that_the_first_batch_lacks() -> None:
    """Regression: repeated layers were looked for in the first batch, and later calls ignored."""

    def run(net: Any, x: Tensor) -> Any:
        for _ in range(3 if x[0, 0] > 0 else 1):
            x = x + 0.2 * torch.relu(net.norm(net.step(x)))
        return net.last(x)

    batches = list(torch.randn(6, 16, 4, dtype=torch.float64))
    for batch in batches:
        batch[0, 0] = -1.0 if batch is batches[0] else 1.0
    means = []
    for data in (batches, batches[1:] + batches[:1]):
        torch.manual_seed(1)
        modules = {"step": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "last": nn.BatchNorm1d(4)}
        net: Any = Model(run, **modules).double()
        report = syncbn.recalibrate(net, data, method="sequential")
        counts = [(layer.name, layer.samples) for layer in report.layers]
        assert counts == [("norm", 16 * (1 + 5 * 3)), ("last", 16 * 6)]
        means.append(net.norm.running_mean)
    torch.testing.assert_close(means[0], means[1], rtol=1e-10, atol=1e-10)


def test_sequential_counts_calls_after_a_layer_that_only_the_first_forward_reaches() -> None:
    calls: list[Tensor] = []

    def run(net: Any, x: Tensor) -> Any:
        calls.append(x)
        x = net.first(x) if len(calls) == 1 else x
        return net.norm(x + 0.2 * net.step(net.norm(x)))

    net = Model(run, first=nn.BatchNorm1d(4), norm=nn.BatchNorm1d(4), step=nn.Linear(4, 4))
    report = syncbn.recalibrate(net, list(torch.randn(4, 16, 4)), method="sequential")
    assert [(layer.name, layer.samples) for layer in report.layers] == [("norm", 2 * 4 * 16)]
