"""Rewriting of a model's forwards, in which layers take over the operations that followed them."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn
from torch.fx import Graph, GraphModule, Node

from syncbn.fusion.matching import Match, find_matches, sole_use
from syncbn.fusion.tracing import callee, trace
from syncbn.nn.fx_call import has_hooks
from syncbn.nn.module import SyncBatchNorm

# Argument of modules that pass a residual on to the layer that they end in.
_RESIDUAL = "residual_of_the_last_layer"


class FusedModule(nn.Module):
    """Base of modules with a rewritten forward."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"got a {type(self).__name__} to pickle; expected a module that is not fused: call "
            "undo() of the result of syncbn.fuse(), or save the state_dict(), which is equal"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        reduced: Any = super().__reduce_ex__(4)
        make, arguments, state, *_ = reduced
        clone = memo[id(self)] = make(*arguments)
        clone.__setstate__(copy.deepcopy(state, memo))
        return clone


@dataclass
class Fusion:
    """Result of :func:`syncbn.fuse`.

    Attributes:
        fused: operations moved into a layer, as "relu" or "residual, relu", by name of the layer.
        skipped: reason why a forward cannot be rewritten, by name of the module.
    """

    fused: dict[str, str]
    skipped: dict[str, str]
    # Slopes of the fused layers before.
    _layers: dict[SyncBatchNorm, float] = field(repr=False)
    # Original class and fused class of each module.
    _classes: dict[nn.Module, tuple[type[nn.Module], type[nn.Module]]] = field(repr=False)

    def undo(self) -> None:
        """Restore the layers and classes of the model; a second call has no effect.

        Raises:
            RuntimeError: the class of a module changed after the fusion (``fully_shard``, a
                parametrization). Undo that change first; the model is unmodified.
        """
        for module, (_, fused) in self._classes.items():
            if type(module) is not fused:
                raise RuntimeError(
                    f"got a {type(module).__name__} to undo; expected a {fused.__name__}, the "
                    "class set by syncbn.fuse(): first undo the later change of the class"
                )
        for module, (original, _) in self._classes.items():
            module.__class__ = original
        for layer, slope in self._layers.items():
            layer._syncbn_activation, layer._syncbn_negative_slope = None, slope
        self._classes.clear()
        self._layers.clear()
        self.fused.clear()


def fuse(model: nn.Module) -> Fusion:
    """Move a residual addition and an activation after a synchronized layer into the layer.

    ``relu(bn(x))`` and ``relu(bn(x) + residual)`` become one pass over the memory, forward and
    backward; likewise ReLU6, LeakyReLU, SiLU, Hardswish and GELU. In an addition, the layer must be
    the operand computed last. The layer may be the last one of a child (a ``Sequential``, a block).
    The model is changed in place: modules get new forwards, and keep their identity, children,
    hooks and ``state_dict``.

    A forward is rewritten if it only calls children and functions of torch, and assigns local
    names; ``skipped`` gives the reason otherwise. Layers with hooks, and layers that are called or
    registered twice, are unchanged. All-reduces keep their order, so ranks may fuse different
    layers. Layers must not be called from outside the model's forwards. Fused activation modules
    are no longer called, nor are children added to a fused module later. A fused model cannot be
    pickled; copies made by ``deepcopy`` stay fused.

    Args:
        model: network converted by :func:`syncbn.convert_sync_batchnorm`.

    Returns:
        The changes; ``syncbn.fuse(model).undo()`` reverts them.
    """
    return _FusionPass(model).run()


class _FusionPass:
    """Traces the modules of a model, then changes them, children before their parents."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._registrations = Counter(m for _, m in model.named_modules(remove_duplicate=False))
        # Modules that end in a layer that can be fused, with the call of the child that they end
        # in; None for the layer itself.
        self._last_calls: dict[nn.Module, Node | None] = {}
        self._changed: dict[nn.Module, Graph] = {}
        self._fused: dict[SyncBatchNorm, Match] = {}

    def run(self) -> Fusion:
        """Rewrite the modules of all matches."""
        graphs, skipped = {}, {}
        for module, name in self._names.items():
            try:
                if isinstance(module, FusedModule):
                    raise ValueError("it is already fused")
                if any(isinstance(child, SyncBatchNorm) for child in list(module.modules())[1:]):
                    graphs[module] = trace(module)
            except ValueError as error:
                skipped[name] = str(error)
        calls = Counter(callee(m, node) for m, graph in graphs.items() for node in graph.nodes)
        for module in reversed(self._names):
            once = calls[module] == 1 and self._registrations[module] == 1
            is_private = once and not has_hooks(module)
            if isinstance(module, SyncBatchNorm):
                forward = vars(module).get("forward", type(module).forward)
                is_plain = forward is SyncBatchNorm.forward and module._syncbn_activation is None
                if is_private and is_plain:
                    self._last_calls[module] = None
            elif module in graphs:
                self._rewrite(module, graphs[module], is_private)
        slopes = {layer: layer._syncbn_negative_slope for layer in self._fused}
        classes = self._change_classes()
        fused = {name: str(self._fused[m]) for m, name in self._names.items() if m in self._fused}
        return Fusion(fused, skipped, slopes, classes)

    def _rewrite(self, module: nn.Module, graph: Graph, is_private: bool) -> None:
        norms = {node for node in graph.nodes if callee(module, node) in self._last_calls}
        for match in find_matches(module, graph, norms):
            self._fuse(module, graph, match)
            self._changed[module] = graph
        (output,) = graph.find_nodes(op="output")
        match sole_use(output.args[0]):
            case Node() as last if is_private and len([*last.args, *last.kwargs]) == 1:
                if callee(module, last) in self._last_calls:
                    self._last_calls[module] = last

    def _fuse(self, module: nn.Module, graph: Graph, match: Match) -> None:
        norm, add, last, _ = match
        with graph.inserting_before(add or norm):
            call = graph.node_copy(norm)
        if add is not None:
            (residual,) = (node for node in add.all_input_nodes if node is not norm)
            _pass_residual(module, call, residual)
        last.replace_all_uses_with(call)
        for node in filter(None, (last, add, norm)):
            graph.erase_node(node)
        layer = self._consume_norm(callee(module, norm), add is not None)
        self._fused[layer] = match

    def _consume_norm(self, module: nn.Module, with_residual: bool) -> SyncBatchNorm:
        """Return the layer that a module ends in; pass the residual through all modules above."""
        call = self._last_calls.pop(module)
        if call is None:
            assert isinstance(module, SyncBatchNorm)
            return module
        if with_residual:
            *_, parameter = call.graph.find_nodes(op="placeholder")
            with call.graph.inserting_after(parameter):
                residual = call.graph.placeholder(_RESIDUAL, default_value=None)
            _pass_residual(module, call, residual)
            self._changed[module] = call.graph
        return self._consume_norm(callee(module, call), with_residual)

    def _change_classes(self) -> dict[nn.Module, tuple[type[nn.Module], type[nn.Module]]]:
        # Modules with equal class and forward keep equal classes, for compilers to share their
        # code. All classes are made before the first is used: __init_subclass__ may raise.
        made: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}
        classes = {}
        for module, graph in self._changed.items():
            graph.lint()
            kind, traced = type(module), GraphModule(module, graph)
            if (key := (kind, traced.code)) not in made:
                # The class of a GraphModule is unshared, and its forward a plain function.
                members = {"__module__": kind.__module__, "forward": type(traced).forward}
                made[key] = type(f"Fused{kind.__name__}", (FusedModule, kind), members)
            classes[module] = kind, made[key]
        for module, (_, fused) in classes.items():
            module.__class__ = fused
        for layer, match in self._fused.items():
            layer._syncbn_activation = match.activation.name
            if match.activation.name == "leaky_relu":
                layer._syncbn_negative_slope = match.activation.negative_slope
        return classes


def _pass_residual(module: nn.Module, call: Node, residual: Node) -> None:
    is_layer = isinstance(callee(module, call), SyncBatchNorm)
    call.kwargs = {**call.kwargs, "residual" if is_layer else _RESIDUAL: residual}
