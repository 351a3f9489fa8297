"""Hash of the C++ sources, checksum of the library. hatch_build.py runs this file without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path


def find_sources(folder: Path) -> list[Path]:
    """Return the C++ files below the kernels' folder; an installed wheel has none."""
    return sorted(folder.glob("csrc/*"))


def hash_sources(folder: Path) -> str:
    """Return a text with the SHA-256 of the C++ files."""
    digest = hashlib.sha256()
    for path in find_sources(folder):
        digest.update(path.read_bytes())
    return f"syncbn sources {digest.hexdigest()}"


def checksum_path(library: Path) -> Path:
    """Return the path of a library's checksum file."""
    return library.with_suffix(".sha256")


def checksum(library: Path) -> str:
    """Return the SHA-256 of a library as a line of `sha256sum`."""
    return f"{hashlib.sha256(library.read_bytes()).hexdigest()}  {library.name}\n"


def is_intact(library: Path) -> bool:
    """Return whether a library has the checksum that the build wrote.

    Raises:
        OSError: the library or its checksum is missing.
    """
    return checksum_path(library).read_text() == checksum(library)
