"""Digests of the C++ library's sources and of the library. No imports of torch: hatch_build.py."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sources(folder: Path) -> list[Path]:
    """Return the C++ files in the folder of the kernels; none in an installed wheel."""
    return sorted(folder.glob("csrc/*"))


def digest(folder: Path) -> str:
    """Return what changes with the C++ files."""
    found = hashlib.sha256()
    for path in sources(folder):
        found.update(path.read_bytes())
    return f"syncbn sources {found.hexdigest()}"


def checksum_path(library: Path) -> Path:
    """Return the file that holds the checksum of a library."""
    return library.with_suffix(".sha256")


def checksum(library: Path) -> str:
    """Return the SHA-256 of a library, as a line of `sha256sum`."""
    return f"{hashlib.sha256(library.read_bytes()).hexdigest()}  {library.name}\n"


def is_intact(library: Path) -> bool:
    """Return whether a library is the one that was built.

    Raises:
        OSError: the library or its checksum is missing.
    """
    return checksum_path(library).read_text() == checksum(library)
