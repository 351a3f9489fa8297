"""Patterns that fuse into a layer: an activation, or an addition and an activation, after it."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from syncbn.fusion.tracing import callee
from syncbn.kernels.activations import Activation, ActivationName
from syncbn.nn.activation_modules import find_activation, make_activation

_CALLS = ("call_function", "call_method")
# Functions and methods, by name of the activation.
_FUNCTIONS: dict[Any, ActivationName] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
}
_INPLACE_ADDITIONS = {operator.iadd, "add_"}
_ADDITIONS = {operator.add, torch.add, "add", *_INPLACE_ADDITIONS}


class Match(NamedTuple):
    """Operations that become one.

    Attributes:
        norm: call of a layer, or of a module that ends in one.
        add: addition of a residual, or None.
        last: call of the activation.
        activation: the activation.
    """

    norm: Node
    add: Node | None
    last: Node
    activation: Activation

    def __str__(self) -> str:
        return self.activation.name if self.add is None else f"residual, {self.activation.name}"


def find_matches(root: nn.Module, graph: Graph, norms: set[Node]) -> list[Match]:
    """Return the matches in the graph of a module; norms are the calls of layers in it."""
    matches: list[Match] = []
    for last in graph.nodes:
        source = sole_use(last.args[0] if last.args else None)
        if source is None or (activation := _find_activation(root, last)) is None:
            continue
        if source in norms:
            matches.append(Match(source, None, last, activation))
        elif (norm := _find_summand(source, norms)) is not None:
            matches.append(Match(norm, source, last, activation))
    return matches


def sole_use(value: object) -> Node | None:
    """Return an argument of a node if it is a node without further users, or None."""
    return value if isinstance(value, Node) and len(value.users) == 1 else None


def _find_summand(add: Node, norms: set[Node]) -> Node | None:
    """Return the call of the layer whose output an addition takes, or None."""
    is_addition = add.op in _CALLS and add.target in _ADDITIONS
    if not is_addition or add.kwargs or len(add.args) != 2 or add.args[0] is add.args[1]:
        return None
    # An in-place addition changes its left operand, which may have other references; the output
    # of a layer has none.
    is_private = add.target not in _INPLACE_ADDITIONS or sole_use(add.args[0]) in norms
    for norm in map(sole_use, add.args if is_private else add.args[:1]):
        # Between them, a call may write to the layer's input or communicate. A layer with more
        # arguments has a residual or a mask already.
        if norm in norms and norm.next is add and len([*norm.args, *norm.kwargs]) == 1:
            return norm
    return None


def _find_activation(root: nn.Module, node: Node) -> Activation | None:
    """Return the activation that a node calls, if layers have it."""
    if node.op == "call_module":
        return find_activation(callee(root, node))
    name = _FUNCTIONS.get(node.target) if node.op in _CALLS else None
    if name is None:
        return None
    # The second argument of leaky_relu; the other functions ignore it.
    return make_activation(
        name, dict(node.kwargs) | dict(zip(["negative_slope"], node.args[1:], strict=False))
    )
