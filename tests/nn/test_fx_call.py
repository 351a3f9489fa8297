"""torch.fx traces of models with synchronized layers, and conv-bn folding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer, symbolic_trace
from torch.nn.utils.fusion import fuse_conv_bn_eval

import syncbn
from syncbn.inference import convert_prior_mix

# The import of torch.fx.experimental.optimization warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


class Subclass(nn.BatchNorm2d):
    pass


def _plain(last: type[nn.BatchNorm2d] = Subclass) -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1)
    net = nn.Sequential(convolutions[0], nn.BatchNorm2d(5), nn.ReLU(), convolutions[1], last(4))
    net(_images() * 3 + 1)
    return net


def _images() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def _fold(net: nn.Module) -> Any:
    from torch.fx.experimental.optimization import fuse

    return fuse(net)


def _calls(graph: GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("training", [True, False])
def test_layers_are_leaves_of_a_trace(training: bool) -> None:
    """Regression: the tracer entered the layers and failed at the first input check."""
    plain = _plain()
    net = syncbn.convert_sync_batchnorm(copy.deepcopy(plain)).train(training)
    traced = symbolic_trace(net)
    assert _calls(traced) == ["0", "1", "2", "3", "4"]
    for mode in (True, False):
        x = _images()
        torch.testing.assert_close(traced.train(mode)(x), plain.train(mode)(x))
    torch.testing.assert_close(dict(traced.named_buffers()), dict(plain.named_buffers()))
    assert torch.equal(copy.deepcopy(traced)(x), traced(x))


class Residual(nn.Module):
    """Passes a residual and a mask to its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = syncbn.SyncBatchNorm2d(3, activation="relu")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.norm(x, x * 2, mask=mask)
        return y


def test_residual_and_mask_are_recorded() -> None:
    net, x = Residual(), _images()
    mask = torch.rand(4, 6, 6) > 0.3
    expected = copy.deepcopy(net)(x, mask)
    torch.testing.assert_close(symbolic_trace(net)(x, mask), expected)


def test_fused_models_and_inference_rules_are_traced() -> None:
    net, x = syncbn.convert_sync_batchnorm(_plain()).eval(), _images()
    syncbn.fuse(net)
    torch.testing.assert_close(symbolic_trace(net)(x), net(x))
    with_rule = convert_prior_mix(syncbn.convert_sync_batchnorm(_plain()).eval(), 4)
    torch.testing.assert_close(symbolic_trace(with_rule)(x), with_rule(x))


class _LeafTracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def test_hooks_are_not_recorded_twice() -> None:
    """The traced module runs a leaf's hooks; in the graph they would run a second time."""
    net, x = syncbn.convert_sync_batchnorm(_plain()).eval(), _images()
    net[1].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(RuntimeError, match=r"1 SyncBatchNorm2d: got a torch\.fx trace of"):
        symbolic_trace(net)
    graph = _LeafTracer().trace(net)
    torch.testing.assert_close(GraphModule(net, graph)(x), net(x))


def test_layer_as_trace_root_raises() -> None:
    with pytest.raises(RuntimeError, match="expected a model that contains the layer"):
        symbolic_trace(syncbn.SyncBatchNorm2d(3))


@pytest.mark.parametrize("reverted", [False, True])
def test_torch_fx_folds_reverted_models_only(reverted: bool) -> None:
    """torch.fx folds only exact torch classes; synchronized layers stay in the graph."""
    plain = _plain(nn.BatchNorm2d).eval()
    net, x = syncbn.convert_sync_batchnorm(copy.deepcopy(plain)), _images()
    if reverted:
        syncbn.revert_sync_batchnorm(net)
    folded = _fold(net)
    assert _calls(folded) == (["0", "2", "3"] if reverted else ["0", "1", "2", "3", "4"])
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-5)


def test_fuse_conv_bn_eval_folds_one_layer() -> None:
    plain = _plain().eval()
    net: Any = syncbn.convert_sync_batchnorm(copy.deepcopy(plain))
    x = _images()
    folded = fuse_conv_bn_eval(net[0], net[1])
    torch.testing.assert_close(folded(x), plain[:2](x), rtol=1e-4, atol=1e-5)


def test_folding_a_fused_model_keeps_the_relu() -> None:
    """torch.fx must not fold a layer with a ReLU: it would drop the ReLU."""
    plain = _plain().eval()
    net, x = syncbn.convert_sync_batchnorm(copy.deepcopy(plain)), _images()
    assert syncbn.fuse(net).fused == {"1": "relu"}
    torch.testing.assert_close(_fold(net)(x), plain(x), rtol=1e-4, atol=1e-5)
