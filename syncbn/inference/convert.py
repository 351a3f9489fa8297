"""Conversion of a model's layers to an inference rule and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.inference.rule import EvalStatistics, EvalStatisticsMixin, base_class, with_rule
from syncbn.nn.bn_layers import BNLayer, find_layers
from syncbn.nn.conversion import change_class
from syncbn.nn.module import SyncBatchNorm

M = TypeVar("M", bound=nn.Module)


def convert_inference(model: M, make_rule: Callable[[BNLayer], EvalStatistics | None]) -> M:
    """Set the inference rule of every batch-norm layer, in place; of no layer on an error.

    A layer that overrides ``forward`` is left alone, with a warning: the rule would replace it.

    Args:
        model: network or a single layer.
        make_rule: function that returns the rule of a layer; None to leave the layer unchanged.

    Raises:
        ValueError: no layers with running statistics; all layers override ``forward``; a layer has
            a rule already.
    """
    rules: list[tuple[_BatchNorm, EvalStatistics]] = []
    left_alone: list[str] = []
    layers = find_layers(model)
    for layer in layers:
        if _overrides_forward(layer.module):
            left_alone.append(f"{layer.name} ({type(layer.module).__qualname__})")
        elif (rule := make_rule(layer)) is not None:
            rule.layer_name = layer.name
            rules.append((layer.module, rule))
    if len(left_alone) == len(layers):
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
        change_class(module, with_rule)
    return model


def revert_inference(model: M) -> M:
    """Remove the inference rules of a model in place, and return the model.

    Args:
        model: network or a single layer.
    """
    for module in list(model.modules()):
        if isinstance(module, EvalStatisticsMixin) and change_class(module, base_class):
            del module._syncbn_rule
    return model


def _overrides_forward(module: _BatchNorm) -> bool:
    known = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
    return "forward" in vars(module) or type(module).forward not in known
