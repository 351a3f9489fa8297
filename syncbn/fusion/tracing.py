"""Trace of one module's forward by ``torch.fx``, with each child as a single call.

A trace records operations on tensors. Contexts, autograd functions, numbers stored on the module,
conditions and side effects would be lost or frozen. So the source is checked first: a forward may
only call children and functions of torch, and assign local names.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterable
from functools import partialmethod
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.nn.utils import parametrize

from syncbn.nn.fx_call import has_hooks

_NAMES = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor"
INPLACE_OPERATORS = {name: getattr(operator, name) for name in _NAMES.split()}
_PURE = [f for name, f in vars(F).items() if callable(f) and not name.startswith("_")]
_PURE += [torch.add, torch.sub, torch.mul, torch.relu, torch.relu_, torch.cat, torch.flatten]
# Nodes that a trace records if it records their children.
_RECORDED = (
    *(ast.Pass, ast.Return, ast.Assign, ast.AugAssign, ast.If, ast.IfExp, ast.Constant, ast.BinOp),
    *(ast.UnaryOp, ast.Tuple, ast.Subscript, ast.Slice, ast.keyword),
    *(ast.operator, ast.unaryop, ast.expr_context),
)
_LOCAL, _UNKNOWN = object(), object()


def trace(module: nn.Module) -> Graph:
    """Return the graph of a module's forward, without ``nn.Identity`` and empty ``Sequential``s.

    Raises:
        ValueError: the graph would be incomplete; the message gives the reason.
    """
    if "forward" in vars(module):
        raise ValueError("its forward is an attribute of the instance")
    if type(module).__module__ == parametrize.__name__:
        raise ValueError("it is parametrized")
    if hasattr(module, "__deepcopy__"):  # copies would lose the new forward
        raise ValueError("it has its own __deepcopy__")
    for parameter in inspect.signature(module.forward).parameters.values():
        has_default = parameter.default is not parameter.empty
        if has_default or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise ValueError(f"its forward takes {parameter}; expected required arguments only")
    if type(module).forward is not nn.Sequential.forward:
        _MethodChecker(module, set()).check(type(module).forward)
    try:
        graph = _LeafTracer().trace(module)
    except Exception as error:  # a user's forward may raise anything when called without tensors
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"torch.fx cannot trace its forward: {reason}") from error
    for node in graph.nodes:
        child = callee(module, node)
        is_identity = type(child) is nn.Identity or (type(child) is nn.Sequential and not child)
        if is_identity and not has_hooks(child) and node.args:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def callee(module: nn.Module, node: Node) -> Any:
    """Return the child that a node of a module's graph calls; None for other nodes."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _record(self: Proxy, function: Callable[..., Any], other: Any) -> Proxy:
    return self.tracer.create_proxy("call_function", function, (self, other), {})


# torch's Proxy records x += y as x = x + y, which differs for other references to x.
_METHODS = {f"__{name}__": partialmethod(_record, f) for name, f in INPLACE_OPERATORS.items()}
_InplaceProxy: Any = type("_InplaceProxy", (Proxy,), _METHODS)


class _LeafTracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Any:
        return _InplaceProxy(node, self)


class _MethodChecker:
    """Check of one method, by its source."""

    def __init__(self, module: nn.Module, checked: set[Callable[..., Any]]) -> None:
        self._module, self._checked = module, checked

    def check(self, method: Any) -> None:
        """Check a method of the module, and the methods that it calls."""
        self._name = getattr(method, "__name__", "forward")
        nested = getattr(method, "__closure__", None) or hasattr(method, "__wrapped__")
        try:
            tree: Any = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
        except (OSError, SyntaxError, TypeError) as error:
            raise ValueError(f"the source of its {self._name} cannot be read: {error}") from error
        if nested or not inspect.isfunction(method) or tree.decorator_list:
            raise ValueError(f"its {self._name} is decorated, or defined in another function")
        this, *arguments = (argument.arg for argument in tree.args.args)
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        self._locals = {*arguments, *(n.id for n in names if isinstance(n.ctx, ast.Store))}
        self._self, self._globals = {this: self._module}, method.__globals__
        self._checked.add(method)
        self._visit(tree.body)

    def _visit(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            if (children := self._children(node)) is None:
                self._reject(node)
            self._visit(children)

    def _children(self, node: ast.AST) -> list[Any] | None:
        """Return the nodes that a trace has to record for this one; None if it loses this one."""
        match node:
            case ast.Expr(ast.Constant()):  # a docstring
                return []
            case ast.AnnAssign(target, _, value):
                return [target, value or target]
            case ast.Name(name):
                return [] if name in self._locals else None
            case ast.Attribute(ctx=ast.Load()):
                value = self._resolve(node, self._self)
                return [] if value is _LOCAL or isinstance(value, Tensor) else None
            case ast.Call(function, arguments, keywords):
                return [*arguments, *keywords] if self._is_recorded(function) else None
            case ast.Compare(left, [ast.Is() | ast.IsNot()], [ast.Constant(None)]):
                child = self._resolve(left, self._self)
                return [] if child is None or isinstance(child, nn.Module) else None
            case ast.If(test) | ast.IfExp(test) if not isinstance(test, ast.Compare):
                self._reject(test)
        return list(ast.iter_child_nodes(node)) if isinstance(node, _RECORDED) else None

    def _is_recorded(self, function: ast.expr) -> bool:
        """Return whether a trace records a call of a function."""
        callee = self._resolve(function, self._self)
        if inspect.ismethod(callee) and callee.__self__ is self._module:
            if callee.__func__ not in self._checked:
                _MethodChecker(self._module, self._checked).check(callee.__func__)
            return True
        is_tensor_method = callee is _LOCAL and isinstance(function, ast.Attribute)
        if is_tensor_method or callee is None or isinstance(callee, nn.Module):
            return True  # None: a missing child, behind a condition
        callee = self._resolve(function, self._globals)
        return any(callee is pure for pure in _PURE)

    def _resolve(self, node: ast.expr, names: dict[str, Any]) -> Any:
        """Return the object of an expression; _LOCAL for a result of the forward, or _UNKNOWN."""
        match node:
            case ast.Name(name):
                return _LOCAL if name in self._locals else names.get(name, _UNKNOWN)
            case ast.Attribute(value, name):
                owner = self._resolve(value, names)
                return _LOCAL if owner is _LOCAL else getattr(owner, name, _UNKNOWN)
            case ast.Subscript(ast.Attribute() as container, ast.Constant(int() as index)):
                children = self._resolve(container, names)
                if isinstance(children, nn.ModuleList) and index < len(children):
                    return children[index]
        self._visit([node])
        return _LOCAL

    def _reject(self, node: ast.AST) -> NoReturn:
        text, *_ = ast.unparse(node).splitlines()
        raise ValueError(f"its {self._name} has {text!r}, which torch.fx may not record")
