"""Conversion of timm's models: every batch-norm layer, equal outputs of one rank, exact revert.

``python -m tests.timm_sweep [NAME ...]`` sweeps some models, or all. Weights are random, inputs as
small as a model takes. ``--parameters N`` skips the numerical comparison of models with more
parameters: their layers are still converted, on the meta device.
"""

from __future__ import annotations

import argparse
import copy
import sys
import types
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import syncbn

SIZES = (32, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 331, 384, 448, 512)
# With two samples, channels of a single pixel have a variance near eps, and deep networks amplify
# rounding errors to 1e-1.
BATCH = 8
BOUND = 1e-6


class TorchvisionNames(MetaPathFinder, Loader):
    """Modules that hold any name of torchvision, which timm imports and the models do not call."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith("torchvision") else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__dict__["__getattr__"] = self._make_name
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """The names are made when they are imported."""

    @staticmethod
    def _make_name(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # Annotations and default arguments use members of enumerations.
        return type(name, (nn.Module,), {"NEAREST": 0, "BILINEAR": 1, "BICUBIC": 2} | _MEMBERS)


_MEMBERS = {"BOX": 3, "HAMMING": 4, "LANCZOS": 5, "NEAREST_EXACT": 6}


def import_timm() -> Any:
    """Return timm, with names of torchvision if it is not installed."""
    if find_spec("torchvision") is None:
        sys.meta_path.append(TorchvisionNames())
    return import_module("timm")


def batch_norms(model: nn.Module) -> list[str]:
    """Return the names of all layers that are a batch norm with statistics of the batch."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        or type(module).__name__ in ("InplaceAbn", "InPlaceABN")
    ]


def convert(model: nn.Module) -> int:
    """Convert a model and return the number of layers that are left; without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        syncbn.convert_sync_batchnorm(model)
    modules = dict(model.named_modules())
    return sum(not isinstance(modules[name], syncbn.SyncBatchNorm) for name in batch_norms(model))


def find_input(model: Any) -> Tensor:
    """Return the smallest batch that a model takes."""
    config = model.default_cfg
    fixed = config["input_size"][-1:] if config.get("fixed_input_size") else SIZES
    for size in fixed:
        x = torch.randn(BATCH, 3, size, size, dtype=torch.float64)
        try:
            with torch.no_grad():
                copy.deepcopy(model).train()(x)
        except (RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError):
            continue
        return x
    raise ValueError(f"no size of {tuple(fixed)} fits")


def outputs(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield the outputs in training and in evaluation, and all buffers."""
    with torch.no_grad():
        for training in (True, False):
            torch.manual_seed(0)  # dropout and stochastic depth
            y = model.train(training)(x)
            yield from y if isinstance(y, tuple | list) else [y]
    yield from model.buffers()


def difference(model: nn.Module, plain: nn.Module, x: Tensor) -> float:
    """Return the largest difference relative to the largest value of a tensor, or absolute."""
    pairs = zip(outputs(model, x), outputs(plain, x), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


def check(timm: Any, name: str, parameters: int) -> str:
    """Return the report on a model: layers, layers left, difference; empty without batch norm."""
    with torch.device("meta"):
        shape = timm.create_model(name, pretrained=False)
    if not batch_norms(shape):
        return ""
    count = sum(p.numel() for p in shape.parameters())
    if count > parameters:
        layers = len(batch_norms(shape))
        return f"{layers} layers, {convert(shape)} left, {count / 1e6:.0f}M parameters: not run"
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).double()
    plain = copy.deepcopy(model)
    x = find_input(plain)
    left, layers = convert(model), len(batch_norms(plain))
    error = difference(model, plain, x)
    syncbn.revert_sync_batchnorm(model)
    kinds = ([type(m) for m in net.modules()] for net in (model, plain))
    reverted = "exact" if next(kinds) == next(kinds) else "NOT EXACT"
    verdict = "" if error <= BOUND and not left and reverted == "exact" else "  FAILED"
    return f"{layers} layers, {left} left, off {error:.0e}, revert {reverted}{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--parameters", type=int, default=10**12)
    arguments = parser.parse_args()
    timm, failed, total = import_timm(), [], 0
    for name in arguments.names or timm.list_models():
        try:
            report = check(timm, name, arguments.parameters)
        except Exception as error:  # any model may fail in any way, and the sweep goes on
            report = f"FAILED: {type(error).__name__}: {error}".splitlines()[0]
        if report:
            print(f"{name}: {report}", flush=True)
            total += 1
            failed += [name] if "FAILED" in report or ", 0 left" not in report else []
    print(f"{total} models with batch norm, {len(failed)} failed: {' '.join(failed)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
