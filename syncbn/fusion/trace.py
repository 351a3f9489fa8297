"""The forward of one module as a graph, its children as single calls."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.nn.utils import parametrize

from syncbn.fusion.readable import check_readable
from syncbn.nn.fx_call import has_hooks


def _in_place(function: Callable[..., Any]) -> Callable[[Proxy, Any], Proxy]:
    def record(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


class _Value(Proxy):
    """What a forward works with while it is traced.

    torch's makes ``x + y`` of ``x += y``, which is something else for whoever has x.
    """

    __iadd__ = _in_place(operator.iadd)
    __isub__ = _in_place(operator.isub)
    __imul__ = _in_place(operator.imul)
    __itruediv__ = _in_place(operator.itruediv)
    __ifloordiv__ = _in_place(operator.ifloordiv)
    __imod__ = _in_place(operator.imod)
    __ipow__ = _in_place(operator.ipow)
    __iand__ = _in_place(operator.iand)
    __ior__ = _in_place(operator.ior)
    __ixor__ = _in_place(operator.ixor)


class _Shallow(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Proxy:
        return _Value(node, self)


def trace(module: nn.Module) -> Graph:
    """Return the graph of a module's forward, without `nn.Identity`.

    Raises:
        ValueError: the graph would not be all of it; the message says why.
    """
    if "forward" in vars(module):
        raise ValueError("it has a forward of its own, which is not that of its class")
    if type(module).__module__ == parametrize.__name__:
        raise ValueError("it is parametrized")
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise ValueError(f"its forward takes {parameter}")
        if parameter.default is not parameter.empty:
            raise ValueError(f"its forward has an optional argument, {parameter.name}")
    check_readable(module)
    try:
        graph = _Shallow().trace(module)
    except Exception as error:  # whatever a user's forward raises when it is given no tensors
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"torch.fx cannot trace its forward: {reason}") from error
    _drop_identities(module, graph)
    return graph


def source(graph: Graph) -> str:
    """Return the forward that a graph describes as text."""
    return str(graph.python_code("self").src)


def compiled(graph: Graph) -> Callable[..., Any]:
    """Return the forward, a method, that a graph describes."""
    graph.lint()
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(code.src, namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward


def _drop_identities(module: nn.Module, graph: Graph) -> None:
    for node in graph.nodes:
        child = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(child) is nn.Identity and not has_hooks(child) and node.args:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
