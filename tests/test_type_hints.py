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
    """Return functions, classes, methods and properties of a module that have public names."""
    for name, member in vars(module).items():
        if name.startswith("_") or not (inspect.isfunction(member) or inspect.isclass(member)):
            continue
        yield name, member
        for key, value in inspect.getmembers(member):
            yield f"{name}.{key}", value.fget if isinstance(value, property) else value


@pytest.mark.parametrize("module", PUBLIC)
def test_hints_of_public_names_resolve(module: str) -> None:
    """Regression: GroupLike was a string, and resolved only where DeviceMesh is imported."""
    unresolved = []
    for name, member in _annotated(importlib.import_module(module)):
        if not str(getattr(member, "__module__", "")).startswith("syncbn"):
            continue
        try:
            typing.get_type_hints(inspect.unwrap(member))
        except (NameError, AttributeError, TypeError) as error:
            unresolved.append(f"{name}: {error}")
    assert unresolved == []


def test_process_group_hint_lists_accepted_types() -> None:
    hints = typing.get_type_hints(syncbn.convert_sync_batchnorm)
    names = {getattr(kind, "__name__", "") for kind in typing.get_args(hints["process_group"])}
    assert names == {"str", "int", "Sequence", "DeviceMesh", "ProcessGroup", "NoneType"}
