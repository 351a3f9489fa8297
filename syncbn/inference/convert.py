"""Rules into the layers of a model, and out of them again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.calibration.layers import Layer, find_layers
from syncbn.inference.rule import Rule, Ruled, beneath, ruled
from syncbn.nn.class_map import change_class
from syncbn.nn.module import SyncBatchNorm

M = TypeVar("M", bound=nn.Module)


def convert_inference(model: M, make_rule: Callable[[Layer], Rule | None]) -> M:
    """Give every batch-norm layer a rule, in place: all layers, or on an error none.

    A layer with a ``forward`` of its own is left alone, with a warning: the rule would replace it.

    Args:
        model: the model, or a single layer.
        make_rule: returns the rule of a layer; None to leave it as it is.

    Raises:
        ValueError: no layers with running statistics, or only such; a layer has a rule already.
    """
    rules: list[tuple[_BatchNorm, Rule]] = []
    left_alone: list[str] = []
    for layer in find_layers(model):
        if _has_own_forward(layer.module):
            left_alone.append(f"{layer.name} ({type(layer.module).__qualname__})")
        elif (rule := make_rule(layer)) is not None:
            rule.layer_name = layer.name
            rules.append((layer.module, rule))
    if left_alone and not rules:
        raise ValueError(
            f"all layers override forward: {', '.join(left_alone)}; expected one that normalizes "
            "as torch's do"
        )
    if left_alone:
        warnings.warn(
            f"these layers override forward, so they are left alone: {', '.join(left_alone)}",
            stacklevel=2,
        )
    for module, rule in rules:
        module._syncbn_rule = rule
        change_class(module, ruled)
    return model


def revert_inference(model: M) -> M:
    """Let every layer of a model use its running statistics again, in place.

    Args:
        model: the model, or a single layer.

    Returns:
        The model it was given.
    """
    for module in list(model.modules()):
        if isinstance(module, Ruled) and change_class(module, beneath):
            del module._syncbn_rule
    return model


@contextmanager
def reverted_after(model: nn.Module) -> Iterator[None]:
    """Take rules away from a model at the end of the body."""
    try:
        yield
    finally:
        revert_inference(model)


def _has_own_forward(module: _BatchNorm) -> bool:
    known = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
    return "forward" in vars(module) or type(module).forward not in known
