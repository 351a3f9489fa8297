"""What the C++ library was built from, in short. Nothing is imported here, for hatch_build.py."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sources(folder: Path) -> list[Path]:
    """Return the C++ files in the folder of the kernels; none in an installed wheel."""
    return sorted([*folder.glob("*.cpp"), *folder.glob("cpp/*")])


def digest(folder: Path) -> str:
    """Return what changes with the C++ files."""
    found = hashlib.sha256()
    for path in sources(folder):
        found.update(path.read_bytes())
    return f"syncbn sources {found.hexdigest()}"
