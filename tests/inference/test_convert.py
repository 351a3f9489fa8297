"""Conversion to an inference rule and back, without other changes of the model."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.inference import (
    convert_example_weighted,
    convert_prior_mix,
    example_weighted,
    prior_mix,
    revert_inference,
)
from tests.calibration.networks import images, layers, network
from tests.inference.rules import RULES, between, eval_network, single


class Subclass(nn.BatchNorm2d):
    """User's subclass."""


class Activated(nn.BatchNorm2d):
    """Layer that overrides forward."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


def classes(net: nn.Module) -> list[type]:
    return [type(module) for module in net.modules()]


@pytest.mark.parametrize("rule", RULES)
def test_context_and_conversion_are_reverted(rule: str) -> None:
    context, convert = RULES[rule]
    net, x = eval_network(), images(6)
    before, plain = classes(net), net(x)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with context(net):
        expected = net(x)
        assert list(net.state_dict()) == list(state)
    assert (expected - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="expected 4D"), context(net):
        net[1](x[0])
    assert classes(net) == before
    assert convert(net) is net
    assert torch.equal(net(x), expected)
    assert revert_inference(net) is net
    assert classes(net) == before
    assert torch.equal(net(x), plain)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("rule", RULES)
def test_training_mode_is_unchanged(rule: str) -> None:
    net, other, x = network(), network(), images(6)
    net[4], other[4] = nn.Identity(), nn.Identity()  # the dropout
    net[6] = syncbn.convert_sync_batchnorm(net[6])  # torch's layer needs a GPU in training
    other[6] = syncbn.convert_sync_batchnorm(other[6])
    with RULES[rule][0](net):
        assert torch.equal(net(x), other(x))
    for ours, theirs in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]  # Any


@pytest.mark.parametrize("through", [copy.deepcopy, saved])
@pytest.mark.parametrize("rule", RULES)
def test_copies_keep_rule(rule: str, through: Any) -> None:
    net, x = eval_network(), images(6)
    net.append(nn.Unflatten(1, (2, 1, 1)))
    net.append(syncbn.convert_sync_batchnorm(Subclass(2).double().eval()))
    before = classes(net)
    RULES[rule][1](net)
    clone = through(net)
    assert torch.equal(clone(x), net(x))
    revert_inference(clone)
    assert classes(clone) == before


def test_rule_buffers_move_with_model() -> None:
    layer = single(3, torch.float32)
    convert_example_weighted(layer, 4, between(layer))
    rule: Any = layer._syncbn_rule
    layer.double()
    assert rule.between.dtype == torch.float64
    assert layer.to("meta")(torch.empty(2, 3, 4, 4, device="meta").double()).device.type == "meta"


@pytest.mark.parametrize("rule", RULES)
def test_hooks_shared_and_parametrized_layers(rule: str) -> None:
    shared = single(3)
    nn.utils.parametrizations.weight_norm(shared, dim=None)  # type: ignore[arg-type]  # for all
    net, x = nn.Sequential(shared, nn.ReLU(), shared).eval(), images(6)
    seen: list[Tensor] = []
    shared.register_forward_hook(lambda module, args, output: seen.append(output))
    plain = net(x)
    with RULES[rule][0](net):
        y = net(x)
    assert (y - plain).abs().max() > 1e-3
    assert seen[3] is y
    assert torch.equal(net(x), plain)


def test_layer_overriding_forward_is_left_alone() -> None:
    net = nn.Sequential(single(3), Activated(3).double().eval())
    with pytest.warns(UserWarning, match=r"so they are left alone: 1 \(Activated"):
        convert_prior_mix(net, 16)
    assert type(net[0]) is not nn.BatchNorm2d
    assert type(net[1]) is Activated


@pytest.mark.parametrize("rule", RULES)
def test_compiled_without_a_graph_break(rule: str) -> None:
    layer, x = single(3), images(6)
    RULES[rule][1](layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))


def test_repr_shows_rule() -> None:
    net = convert_prior_mix(eval_network(), 16)
    assert "EvalStatisticsBatchNorm2d" in str(net)
    assert "(_syncbn_rule): PriorMix(pseudo_samples=16)" in str(net)


def weighted(**between_of: Tensor) -> Any:
    """Return a rule with other between-sample variances for some layers."""
    return lambda net: example_weighted(net, 4, {**between(net), **between_of})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda net: prior_mix(net, -1), "got pseudo_samples=-1; expected 0 or more"),
        (lambda net: prior_mix(net, math.nan), "got pseudo_samples=nan; expected 0 or more"),
        (lambda net: example_weighted(net, 0.5, {}), "got batch_size=0.5; expected 1 or more"),
        (
            lambda net: example_weighted(net, 4, {}),
            "1: got no between-sample variance; expected one for each",
        ),
        (
            weighted(**{"6": torch.ones(6)}),
            r"6: got a between-sample variance of shape \(6,\); expected \(5,\)",
        ),
        (
            weighted(**{"6": torch.full((5,), math.nan)}),
            "6: got a between-sample variance that is negative or not finite",
        ),
        (lambda _: prior_mix(Activated(3), 4), r"all layers override forward:  \(Activated\)"),
        (lambda net: prior_mix(net[0], 4), "got Conv2d without a batch-norm layer"),
        (
            lambda net: prior_mix(convert_prior_mix(net, 4), 8),
            r"1: follows PriorMix\(pseudo_samples=4\) instead of its running statistics",
        ),
    ],
)
def test_invalid_arguments_change_nothing(rule: Any, message: str) -> None:
    net, x = eval_network(), images(6)
    plain = net(x)
    with pytest.raises(ValueError, match=message), rule(net):
        pass
    assert torch.equal(revert_inference(net)(x), plain)


def test_recalibrate_rejects_model_with_rule() -> None:
    net = convert_prior_mix(eval_network(), 4)
    with pytest.raises(ValueError, match=r"remove it with syncbn.inference.revert_inference"):
        syncbn.recalibrate(net, [images()])
    assert len(layers(net)) == 5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3).double(), "expected 4D input"),
        (
            torch.zeros(2, 4, 2, 2).double(),
            "expected 3 channels in dimension 1, as in running_mean",
        ),
        (torch.zeros(2, 3, 2, 2, dtype=torch.int64), r"dtype torch\.int64; expected float16"),
    ],
)
def test_invalid_layer_inputs(rule: str, x: Tensor, message: str) -> None:
    layer = RULES[rule][1](single(3))
    with pytest.raises(ValueError, match=message):
        layer(x)
