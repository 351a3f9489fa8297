"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file so that ``path`` is at any time absent, the old version, or the new one.

    A file that is there keeps its permissions; a link to it stays one.

    Args:
        path: to write; takes the content of the body at its end, if that does not raise.

    Yields:
        A file in the same folder, open for writing.

    Raises:
        OSError: the disk is full, or the folder cannot be written; an old file stays as it was.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if path.exists():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
