"""Invalid input: errors with the value, the expectation and the remedy; nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.calibration.checks import free_bytes
from tests.calibration.networks import METHODS, Model, images, network, require_error


class Promises:
    """Batches whose length is too large."""

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[Tensor]:
        return iter(images().split(6))


X = images().split(6)
NO_SAMPLES = "no sample reached any of the batch-norm layers"
INVALID: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no samples": ([torch.empty(0, 3, 8, 8).double()], {}, NO_SAMPLES),
    "too few batches": (Promises(), {}, r"ended early: got 4, expected the 9 that their len\(\)"),
    "too few samples": (X, {"num_samples": 25}, r"ended after 24 samples; expected 25 on this"),
    "num_samples=0": (X, {"num_samples": 0}, r"num_samples=0"),
    "samples without a count": (
        [1, 2],
        {"num_samples": 5, "forward": lambda model, batch: model(images(batch))},
        r"num_samples=5 needs to know the samples of a batch, but got a int",
    ),
    "method": (X, {"method": "precise"}, rf"'precise'; expected one of {', '.join(METHODS)}"),
    "float": ([3.5], {}, r"type float; expected a tensor, a sequence .* pass forward="),
    "detection": (
        [[{"image": images(1)[0]}, {"image": images(1)[0]}]],
        {},
        r"got a batch of type list that begins with a dict; .* pass forward=, called as",
    ),
    "text": (["a"], {}, r"got a batch of type str; expected a tensor"),
    "empty batch": ([[]], {}, r"got a batch of type list; expected a tensor"),
    "unused model": (
        X,
        {"forward": lambda model, batch: None},
        rf"{NO_SAMPLES} \(1, 3\.first\.1, 3\.second\.1, 6, 11\)",
    ),
    "one value": ([images(1)], {}, r"11: got one value per channel in the whole calibration set"),
    "max_bytes": (
        X,
        {"max_bytes": 100_000},
        r"would hold .* GiB of activations for 24 samples .*max_bytes=100000.*'sequential'",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_arguments(case: str) -> None:
    batches, options, message = INVALID[case]
    require_error(network().train(), message, batches, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_nonfinite_inputs(method: Any, value: float) -> None:
    net: Any = network()
    net[3].first[0].bias.data[2] = value
    require_error(net, r"3\.first\.1: the .*inputs .*NaN.* infinite", X, method=method)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no batch norm": (lambda: nn.Linear(3, 3), r"got Linear without a batch-norm layer"),
    "a lazy layer": (lambda: nn.Sequential(nn.LazyBatchNorm2d()), r"0: got a lazy layer"),
    "no running statistics": (
        lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)),
        r"0: got a layer with track_running_stats=False",
    ),
    "DataParallel": (
        lambda: nn.Sequential(nn.DataParallel(nn.BatchNorm2d(3))),
        r"got nn\.DataParallel at 0.*pass its \.module",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_unsupported_models(case: str) -> None:
    make, message = MODELS[case]
    with pytest.raises(ValueError, match=message):
        syncbn.recalibrate(make(), images().float().split(6))


def test_layer_in_another_thread() -> None:
    def run(net: Any, x: Tensor) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(torch.no_grad()(net.norm), x).result()

    net = Model(run, norm=nn.BatchNorm2d(3))
    with pytest.raises(RuntimeError, match=r"norm: called in another thread than the forward"):
        syncbn.recalibrate(net, images().float().split(6))
    syncbn.recalibrate(net, images().float().split(6), method="pooled")


def _run_shortcut(net: Any, x: Tensor) -> Any:
    """The second layer's input, the shortcut and the batch are alive at the second layer."""
    shortcut = x + 1
    return shortcut + net.second(net.first(x) * 2)


@pytest.mark.parametrize("stream", [False, True], ids=["list", "stream"])
def test_memory_limit(stream: bool) -> None:
    """A list is refused before its first pass, a stream during the passes."""
    x = images(64, torch.float32)
    calls: list[int] = []
    net = Model(_run_shortcut, first=nn.BatchNorm2d(3), second=nn.BatchNorm2d(3))
    limit = 3 * x.nbytes
    net.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))

    def batches() -> Any:
        return iter(x.split(32)) if stream else x.split(32)

    with pytest.raises(MemoryError, match="for 64 samples on this rank"):
        syncbn.recalibrate(net, batches(), max_bytes=limit - 1)
    assert calls == [2, 32][: 1 + stream]  # two samples are profiled
    syncbn.recalibrate(net, batches(), max_bytes=limit)


def test_page_cache_counts_as_free_in_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("syncbn.calibration.checks._CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 600\nactive_file 100\n")
    assert free_bytes(torch.device("cpu")) == 700
    (tmp_path / "memory.max").write_text("max\n")
    free = free_bytes(torch.device("cpu"))
    assert free is not None
    assert free > 1 << 20
