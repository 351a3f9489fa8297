"""Hooks of trainers, and errors for versions that lack them."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def import_hook(requirement: str, module: str, name: str, *methods: str) -> Any:
    """Return a class of a trainer.

    Args:
        requirement: package and oldest version with the hook, as for pip.
        module: module of the class.
        name: name of the class.
        methods: names that the class must have.

    Raises:
        ImportError: the package is not installed, or its version lacks the hook.
    """
    missing = f"{module}.{name}"
    try:
        found = getattr(import_module(module), name)
        for method in methods:
            missing = f"{module}.{name}.{method}"
            getattr(found, method)
    except (ImportError, AttributeError) as error:
        package = requirement.split(">=")[0]
        raise ImportError(
            f"got {package} {_get_version(package)} without {missing}; expected {requirement}: "
            f"pip install -U '{requirement}'"
        ) from error
    return found


def _get_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
