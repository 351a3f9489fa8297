from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Allow two minutes: importing a trainer takes 10 s, and more on busy cores."""
    for item in items:
        if "/integrations/" in item.nodeid:
            item.add_marker(pytest.mark.timeout(120))
