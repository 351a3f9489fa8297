"""Atomic writes of regular files."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: Path, source: Path | None = None) -> Iterator[IO[bytes]]:
    """Write a file so that ``path`` is at any time absent, the old version, or the new one.

    An existing file keeps its permissions and, where the process may set them, its owner and group.
    A new file has the permissions of the umask. A symbolic link remains a link.

    The content is first written to ``.syncbn-*.tmp`` in the same folder. An exception removes this
    file; a signal without a Python handler, such as SIGKILL, leaves it behind.

    Args:
        path: file to write, complete when the body ends without an exception.
        source: file with the same secrets as the content; the new file grants its group and other
            users no permission that the source does not grant.

    Yields:
        The temporary file, open for binary writing.

    Raises:
        ValueError: ``path`` exists and is not a regular file.
        OSError: the disk is full, or the folder is not writable; an old file is unchanged.
    """
    _require_regular(path)
    path = path.resolve()
    old = path.stat() if path.exists() else None
    limit = None if source is None else source.stat()
    # A random name: process and thread numbers repeat on other hosts.
    temporary = path.with_name(f".syncbn-{secrets.token_hex(8)}.tmp")
    # Created with its final permissions: mkstemp ignores the umask, which no thread can read
    # without changing it for all.
    mode = 0o600 if old is not None else 0o666 if limit is None else _permission_bits(limit) & 0o666
    try:
        # "x" is O_EXCL, which follows no symbolic link.
        with open(temporary, "xb", opener=partial(os.open, mode=mode)) as file:
            if os.name == "posix":
                _set_access(file.fileno(), old, limit)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_file(path: Path) -> None:
    """Raise unless :func:`atomic_write` can write a path.

    Raises:
        ValueError: the folder does not exist or is not writable; the path is a folder, a device, a
            pipe or a socket, or a link to one.
    """
    try:
        _require_regular(path)
        # The folder of a link's target, not of the link.
        folder = path.resolve().parent
        if not folder.is_dir():
            raise ValueError(f"{path}: the folder {folder} does not exist; make it first")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{path}: the folder {folder} cannot be written")
    except (OSError, RuntimeError) as error:  # resolve() raises RuntimeError for a loop of links
        raise ValueError(f"{path}: cannot be written: {error}") from error


def _require_regular(path: Path) -> None:
    # Before resolve(), which turns /dev/stdout into a name without a file.
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path}: is a folder; expected the name of a file")
    if not stat.S_ISREG(mode):
        # Renaming a file to /dev/null would remove the device from the machine.
        raise ValueError(
            f"{path}: is a device, a pipe or a socket, which a file would replace; expected the "
            "name of a regular file"
        )


def _set_access(descriptor: int, old: os.stat_result | None, limit: os.stat_result | None) -> None:
    """Set the owner, group and permissions of a new file.

    Args:
        descriptor: the new file, with the permissions of the umask.
        old: status of the file that it replaces, or None.
        limit: status of the file that it is derived from, or None.
    """
    if old is not None:
        # Root may set both; another user may set a group that includes this user.
        for owner in (old.st_uid, -1):
            with suppress(OSError):
                os.fchown(descriptor, owner, old.st_gid)
                break
    new = os.fstat(descriptor)
    mode = stat.S_IMODE(new.st_mode if old is None else old.st_mode)
    for status in (old, limit):
        if status is not None:
            mode &= _permission_bits(status, new.st_gid)
    # Some file systems have one mode for all files and refuse any change.
    if mode != stat.S_IMODE(new.st_mode):
        os.fchmod(descriptor, mode)


def _permission_bits(status: os.stat_result, group: int | None = None) -> int:
    """Return a file's permission bits, with every bit of the owner set.

    Args:
        status: result of `os.stat`.
        group: a group whose members take the place of the file's group; None for the file's group.
    """
    shared = status.st_mode & 0o077
    if group not in (None, status.st_gid):
        # Members of another group have the permissions of other users.
        shared = (shared & 0o007) * 0o11
    return 0o700 | shared


def _sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, so that it survives a power failure."""
    # Windows and some network file systems refuse; the file itself is complete.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
