"""Files of a run: written so that a crash leaves the old one whole, read without running code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from syncbn.cli.signals import deferred_termination
from syncbn.files import atomic_write


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file whole or not at all, also if SIGTERM or SIGHUP ends the process.

    Raises:
        ValueError: ``path`` exists and is not a regular file.
        OSError: the disk is full, or the folder cannot be written; an old file stays as it was.
    """
    with deferred_termination(), atomic_write(path) as file:
        yield file


def save(saved: dict[str, Any], path: Path) -> None:
    """Write a file so that ``path`` is at any time absent, the old version, or the new one.

    Raises:
        ValueError: ``path`` exists and is not a regular file.
        OSError: the disk is full, or the folder cannot be written; an old file stays as it was.
    """
    with writing(path) as file:
        torch.save(saved, file)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU without running code from it.

    Raises:
        ValueError: the file is missing or is not a checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a checkpoint")
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes make it raise
        message = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path}: cannot be read as a checkpoint ({message})") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: got a {type(saved).__name__}, expected a dict")
    return saved
