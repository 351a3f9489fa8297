"""Trace of one module's forward, with each child as a single call."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer

from syncbn.fusion.forward_checker import check_forward
from syncbn.nn.fx_call import has_hooks

_NAMES = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor"
INPLACE_OPERATORS = {name: getattr(operator, name) for name in _NAMES.split()}


def _recorder(function: Callable[..., Any]) -> Callable[[Proxy, Any], Proxy]:
    def record(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


# torch's Proxy records x += y as x = x + y, which differs for other references to x.
_METHODS = {f"__{name}__": _recorder(function) for name, function in INPLACE_OPERATORS.items()}
_InplaceProxy: Any = type("_InplaceProxy", (Proxy,), _METHODS)


class _LeafTracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Any:
        return _InplaceProxy(node, self)


def trace(module: nn.Module) -> Graph:
    """Return the graph of a module's forward, without ``nn.Identity``.

    Raises:
        ValueError: the graph would be incomplete; the message gives the reason.
    """
    check_forward(module)
    try:
        graph = _LeafTracer().trace(module)
    except Exception as error:  # a user's forward may raise anything when called without tensors
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"torch.fx cannot trace its forward: {reason}") from error
    for node in graph.nodes:
        child = callee(module, node)
        if type(child) is nn.Identity and not has_hooks(child) and node.args:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def callee(module: nn.Module, node: Node) -> Any:
    """Return the child that a node of a module's graph calls; None for other nodes."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None
