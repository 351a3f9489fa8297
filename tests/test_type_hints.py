"""Annotations of public names, which documentation tools evaluate."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import syncbn

# The packages whose names are re-exported for users.
PUBLIC = ["syncbn", *(f"syncbn.{name}" for name in ("calibration", "distributed", "inference"))]


def _annotated(module: Any) -> Iterator[tuple[str, Any]]:
    """Return classes, methods, properties and functions of a module that have public names."""
    for name, member in vars(module).items():
        if name.startswith("_") or not str(getattr(member, "__module__", "")).startswith("syncbn"):
            continue
        if inspect.isfunction(member):
            yield name, member
        elif inspect.isclass(member):
            yield name, member
            for key, value in vars(member).items():
                function = value.fget if isinstance(value, property) else value
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function):
                    yield f"{name}.{key}", function


@pytest.mark.parametrize("module", PUBLIC)
def test_hints_of_public_names_resolve(module: str) -> None:
    """GroupLike was a text, and resolved only where DeviceMesh is imported."""
    unresolved = []
    for name, member in _annotated(importlib.import_module(module)):
        try:
            typing.get_type_hints(inspect.unwrap(member))
        except (NameError, AttributeError, TypeError) as error:
            unresolved.append(f"{name}: {error}")
    assert unresolved == []


def test_process_group_hint_lists_accepted_types() -> None:
    hints = typing.get_type_hints(syncbn.convert_sync_batchnorm)
    names = {getattr(kind, "__name__", "") for kind in typing.get_args(hints["process_group"])}
    assert names == {"str", "int", "DeviceMesh", "ProcessGroup", "NoneType"}
