"""Modules that get another forward, in which their layers do what came after them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple, NoReturn

from torch import nn
from torch.fx import Graph, Node

from syncbn.fusion.pattern import Place, last_call, places, takes_one_argument
from syncbn.fusion.trace import compiled, source, trace
from syncbn.nn.fx_call import has_hooks
from syncbn.nn.module import SyncBatchNorm

# The argument of modules that pass a residual on to the layer that they end in.
_RESIDUAL = "residual_of_the_last_layer"


class _Ending(NamedTuple):
    """How a module ends in a layer.

    Attributes:
        graph: of its forward; None for the layer itself.
        call: of the child that it ends in.
    """

    graph: Graph | None
    call: Node | None


class Rewriting:
    """The modules of a model, read first, then changed, children before their parents.

    Attributes:
        fused: see :class:`syncbn.Fusion`.
        skipped: see there.
        layers: that have an activation now.
        modules: that have another class now, with their class before and this one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.fused: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.layers: list[SyncBatchNorm] = []
        self.modules: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []
        self._names = {module: name for name, module in model.named_modules()}
        everything = model.named_modules(remove_duplicate=False)
        self._registered = Counter(module for _, module in everything)
        self._endings: dict[nn.Module, _Ending] = {}
        self._changed: dict[nn.Module, Graph] = {}

    def run(self) -> None:
        """Find all places and rewrite them."""
        bottom_up = list(reversed(self._names))
        graphs: dict[nn.Module, Graph] = {}
        for module in self._names:
            children = list(module.modules())[1:]
            if any(isinstance(child, SyncBatchNorm) for child in children):
                try:
                    graphs[module] = trace(module)
                except ValueError as error:
                    self.skipped[self._names[module]] = str(error)
        calls = Counter(
            module.get_submodule(str(node.target))
            for module, graph in graphs.items()
            for node in graph.nodes
            if node.op == "call_module"
        )
        once = {module for module, times in calls.items() if times == 1}
        for module in bottom_up:
            if isinstance(module, SyncBatchNorm):
                if module in once and self._is_mine(module) and _is_plain(module):
                    self._endings[module] = _Ending(None, None)
            elif module in graphs:
                self._rewrite(module, graphs[module], once)
        self.fused = {name: self.fused[name] for name in self._names.values() if name in self.fused}
        self._apply()

    def _rewrite(self, module: nn.Module, graph: Graph, once: set[nn.Module]) -> None:
        norms = {
            str(node.target)
            for node in graph.nodes
            if node.op == "call_module" and module.get_submodule(str(node.target)) in self._endings
        }
        found = places(module, graph, norms)
        for place in found:
            self._fuse(module, graph, place)
        if found:
            self._changed[module] = graph
        last = last_call(graph)
        if last is not None and module in once and self._is_mine(module):
            ends = module.get_submodule(str(last.target)) in self._endings
            if ends and takes_one_argument(last):
                self._endings[module] = _Ending(graph, last)

    def _fuse(self, module: nn.Module, graph: Graph, place: Place) -> None:
        norm, add, relu = place
        child = module.get_submodule(str(norm.target))
        if add is None:
            relu.replace_all_uses_with(norm)
            graph.erase_node(relu)
        else:
            (residual,) = (node for node in add.all_input_nodes if node is not norm)
            with graph.inserting_before(add):
                call = graph.node_copy(norm)
            _give(child, call, residual)
            relu.replace_all_uses_with(call)
            for node in (relu, add, norm):
                graph.erase_node(node)
        layer = self._take(child, add is not None)
        self.layers.append(layer)
        self.fused[self._names[layer]] = "relu" if add is None else "residual, relu"

    def _take(self, module: nn.Module, passes_residual: bool) -> SyncBatchNorm:
        """Return the layer that a module ends in; let those on the way pass a residual on."""
        graph, call = self._endings.pop(module)
        if graph is None or call is None:
            assert isinstance(module, SyncBatchNorm)
            return module
        child = module.get_submodule(str(call.target))
        if passes_residual:
            *_, parameter = (node for node in graph.nodes if node.op == "placeholder")
            with graph.inserting_after(parameter):
                residual = graph.placeholder(_RESIDUAL, default_value=None)
            _give(child, call, residual)
            self._changed[module] = graph
        return self._take(child, passes_residual)

    def _apply(self) -> None:
        # Modules of one class and forward stay of one class, for compilers to see that. All are
        # made before the first is used: a class may forbid to be derived from.
        classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}
        for module, graph in self._changed.items():
            what = type(module), source(graph)
            if what not in classes:
                classes[what] = _fused(type(module), graph)
            self.modules.append((module, type(module), classes[what]))
        for module, _, fused in self.modules:
            module.__class__ = fused
        for layer in self.layers:
            layer._syncbn_activation = "relu"

    def _is_mine(self, module: nn.Module) -> bool:
        """Return whether a module has one place in the model, and nobody sees what it returns."""
        return self._registered[module] == 1 and not has_hooks(module)


def _is_plain(layer: SyncBatchNorm) -> bool:
    forward = vars(layer).get("forward", type(layer).forward)
    return forward is SyncBatchNorm.forward and layer._syncbn_activation is None


def _fused(kind: type[nn.Module], graph: Graph) -> type[nn.Module]:
    namespace = {
        "__module__": kind.__module__,
        "forward": compiled(graph),
        "__reduce_ex__": _refuse,
    }
    if not hasattr(kind, "__deepcopy__"):
        namespace["__deepcopy__"] = _deepcopy  # the default would ask __reduce_ex__
    return type(f"Fused{kind.__name__}", (kind,), namespace)


def _give(child: nn.Module, call: Node, residual: Node) -> None:
    argument = "residual" if isinstance(child, SyncBatchNorm) else _RESIDUAL
    call.kwargs = {**call.kwargs, argument: residual}


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    state = module.__getstate__() if hasattr(module, "__getstate__") else vars(module)
    clone = type(module).__new__(type(module))
    memo[id(module)] = clone
    clone.__setstate__(copy.deepcopy(state, memo))
    return clone


def _refuse(module: nn.Module, protocol: Any) -> NoReturn:
    raise TypeError(
        f"got a {type(module).__name__} to pickle; expected a module that is not fused: undo() "
        "what syncbn.fuse() returned, or save its state_dict(), which is the same"
    )
