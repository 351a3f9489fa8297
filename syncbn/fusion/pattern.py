"""The places of a module's forward where a ReLU follows a synchronized layer."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from syncbn.nn.fx_call import has_hooks
from syncbn.nn.module import SyncBatchNorm

_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS_IN_PLACE = {operator.iadd, "add_"}
_ADDS = {operator.add, torch.add, "add", *_ADDS_IN_PLACE}
_OPERATORS_IN_PLACE = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor),
}


class Place(NamedTuple):
    """A ReLU of what a layer returns, or of that and a residual.

    Attributes:
        norm: the call of the layer, or of a module that ends in one.
        add: the addition of a residual, or None.
        relu: the ReLU.
    """

    norm: Node
    add: Node | None
    relu: Node


def places(root: nn.Module, graph: Graph, norms: set[str]) -> list[Place]:
    """Return the places of a graph, in its order.

    Args:
        root: whose forward the graph is.
        graph: with all children as single calls.
        norms: names of children that are layers, or end in one, and are called once.
    """
    found: list[Place] = []
    for relu in graph.nodes:
        if not _is_relu(root, relu):
            continue
        before = _only_used_here(relu.args[0] if relu.args else None)
        if before is None:
            continue
        if _is_call_of(before, norms):
            found.append(Place(before, None, relu))
            continue
        norm = _added_to(root, before, norms)
        if norm is not None:
            found.append(Place(norm, before, relu))
    return found


def last_call(graph: Graph) -> Node | None:
    """Return the call of a child whose result, and nothing else, a graph returns; or None."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    last = _only_used_here(output.args[0])
    return last if last is not None and last.op == "call_module" else None


def takes_one_argument(call: Node) -> bool:
    """Return whether a layer that is called so can be given a residual as well."""
    return len(call.args) + len(call.kwargs) == 1


def _added_to(root: nn.Module, add: Node, norms: set[str]) -> Node | None:
    """Return the call of the layer to which an addition adds something."""
    plain = add.op in ("call_function", "call_method") and add.target in _ADDS
    if not plain or add.kwargs or len(add.args) != 2:
        return None
    left, right = add.args
    if not isinstance(left, Node) or not isinstance(right, Node) or left is right:
        return None
    # An addition in place changes what stands on its left, which others may have, too; not if a
    # layer has just made it.
    new = _only_used_here(left) is not None and _is_call_of(left, norms)
    for side in (left, right) if new or add.target not in _ADDS_IN_PLACE else (left,):
        norm = _only_used_here(side)
        if norm is None or not _is_call_of(norm, norms) or not takes_one_argument(norm):
            continue
        if _can_wait(root, norm, add):
            return norm
    return None


def _can_wait(root: nn.Module, norm: Node, add: Node) -> bool:
    """Return whether a layer, or what ends in one, may be called when its output is added.

    Messages stay in their order, so that ranks may fuse what others do not, and a call of more than
    a layer stays where it is: it may write, or draw random numbers.
    """
    between = list(_between(norm, add))
    if not between:
        return True
    if not isinstance(root.get_submodule(str(norm.target)), SyncBatchNorm):
        return False
    return not any(_sends(root, node) or _may_write(root, node) for node in between)


def _sends(root: nn.Module, node: Node) -> bool:
    if node.op != "call_module":
        return False
    children = root.get_submodule(str(node.target)).modules()
    return any(isinstance(child, SyncBatchNorm) for child in children)


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _may_write(root: nn.Module, node: Node) -> bool:
    """Return whether a call may change a tensor that the layer, called after it, would get."""
    if node.op == "call_module":
        children = root.get_submodule(str(node.target)).modules()
        return any(getattr(child, "inplace", False) for child in children)
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = (
        node.kwargs.get("inplace"),
        "out" in node.kwargs,
        any(arg is True for arg in node.args),
    )
    return node.target in _OPERATORS_IN_PLACE or name.endswith("_") or any(in_place)


def _only_used_here(value: object) -> Node | None:
    """Return the node that a value is, if it has one user."""
    return value if isinstance(value, Node) and len(value.users) == 1 else None


def _is_call_of(node: Node, children: set[str]) -> bool:
    return node.op == "call_module" and node.target in children


def _is_relu(root: nn.Module, node: Node) -> bool:
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return type(module) is nn.ReLU and not has_hooks(module)
    return node.op in ("call_function", "call_method") and node.target in _RELUS
