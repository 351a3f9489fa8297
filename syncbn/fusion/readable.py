"""Which forwards torch.fx reads whole.

It records what happens to tensors, and nothing else: contexts, functions of autograd, numbers that
a module has, conditions, effects on the module are lost or frozen. So a forward must consist of
calls of children and of functions of torch, and of assignments.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PURE = [f for name, f in vars(F).items() if callable(f) and not name.startswith("_")]
_PURE += [torch.add, torch.sub, torch.mul, torch.relu, torch.relu_, torch.cat, torch.flatten]


def check_readable(module: nn.Module) -> None:
    """Check that nothing of a module's forward would be lost.

    Raises:
        ValueError: something would; the message says what.
    """
    if type(module).forward is not nn.Sequential.forward:
        _Reader(module).read(type(module).forward)


class _Reader:
    """Reads functions of a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known: set[Callable[..., Any]] = set()

    def read(self, function: Callable[..., Any]) -> None:
        if function in self._known:
            return
        self._known.add(function)
        name = getattr(function, "__name__", "forward")
        closed = getattr(function, "__closure__", None) or hasattr(function, "__wrapped__")
        if closed or not inspect.isfunction(function):
            raise ValueError(f"its {name} is decorated, or part of another function")
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        except (OSError, SyntaxError) as error:
            raise ValueError(f"the source of its {name} cannot be read: {error}") from error
        assert isinstance(tree, ast.FunctionDef)
        _Function(self, self._module, function, tree).read()


class _Function:
    """One function: its names, and what is in it."""

    def __init__(
        self,
        reader: _Reader,
        module: nn.Module,
        function: Callable[..., Any],
        tree: ast.FunctionDef,
    ) -> None:
        self._reader, self._module, self._tree = reader, module, tree
        self._globals: dict[str, Any] = getattr(function, "__globals__", {})
        self._self, *arguments = (argument.arg for argument in tree.args.args)
        stored = (n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and _is_stored(n))
        self._locals = {*arguments, *stored}

    def read(self) -> None:
        if self._tree.decorator_list:
            raise ValueError(f"its {self._tree.name} is decorated")
        for statement in self._tree.body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Expr(ast.Constant()) | ast.Pass():
                pass
            case ast.Assign([target], value) | ast.AnnAssign(target, _, value):
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                if value is None or not all(isinstance(name, ast.Name) for name in names):
                    raise self._loses(node)
                self._value(value)
            case ast.AugAssign(ast.Name(), _, value):
                self._value(value)
            case ast.Return(value) if value is not None:
                self._value(value)
            case ast.If(test, body, orelse):
                for statement in body if self._test(test) else orelse:
                    self._statement(statement)
            case _:
                raise self._loses(node)

    def _value(self, node: ast.expr) -> None:
        match node:
            case ast.Constant():
                pass
            case ast.Name(name) if name in self._locals:
                pass
            case ast.Attribute():
                root, *path = self._path(node)
                if root not in self._locals and not isinstance(self._attribute(node, path), Tensor):
                    raise self._loses(node)
            case ast.Call(function, arguments, keywords):
                self._callee(function)
                for argument in (*arguments, *(keyword.value for keyword in keywords)):
                    self._value(argument)
            case ast.IfExp(test, body, orelse):
                self._value(body if self._test(test) else orelse)
            case ast.BinOp() | ast.UnaryOp() | ast.Tuple() | ast.Subscript() | ast.Slice():
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.expr):
                        self._value(child)
            case _:
                raise self._loses(node)

    def _test(self, node: ast.expr) -> bool:
        """Return whether a condition holds: one of whether there is a child."""
        match node:
            case ast.Compare(ast.Attribute() as left, [ast.Is() | ast.IsNot() as op], [none]):
                child = self._attribute(left, self._path(left)[1:])
                is_child = child is None or isinstance(child, nn.Module)
                if is_child and isinstance(none, ast.Constant) and none.value is None:
                    return (child is None) == isinstance(op, ast.Is)
        raise self._loses(node)

    def _callee(self, node: ast.expr) -> None:
        match node:
            case ast.Subscript(ast.Attribute() as container, ast.Constant(int() as index)):
                found = self._attribute(container, self._path(container)[1:])
                children = list(found) if isinstance(found, nn.ModuleList) else []
                if not -len(children) <= index < len(children):
                    raise self._loses(node)
                return
        if not isinstance(node, (ast.Attribute, ast.Name)):
            raise self._loses(node)
        root, *path = self._path(node)
        if root in self._locals and path:
            return  # a method of a tensor, which is recorded
        if root == self._self:
            found = self._attribute(node, path)
            if inspect.ismethod(found) and found.__self__ is self._module:
                self._reader.read(found.__func__)
            elif not isinstance(found, nn.Module):
                raise self._loses(node)
            return
        found = self._globals.get(root)
        for name in path:
            found = getattr(found, name, None)
        if not any(found is function for function in _PURE):
            raise self._loses(node)

    def _path(self, node: ast.expr) -> list[str]:
        """Return the names of ``a.b.c``."""
        match node:
            case ast.Name(name):
                return [name]
            case ast.Attribute(value, name):
                return [*self._path(value), name]
        # An attribute of a value, such as a call: as if of a local name, if that can be read.
        self._value(node)
        return [next(iter(self._locals), "")]

    def _attribute(self, node: ast.expr, path: list[str]) -> object:
        """Return what ``self.a.b`` is now."""
        found: Any = self._module
        if self._path(node)[0] != self._self:
            raise self._loses(node)
        for name in path:
            found = getattr(found, name, None)
        return found

    def _loses(self, node: ast.AST) -> ValueError:
        text, *_ = ast.unparse(node).splitlines()
        raise ValueError(
            f"its {self._tree.name} has {text!r}, of which torch.fx may lose something"
        )


def _is_stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)
