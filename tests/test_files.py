"""Atomic writes, by real processes that real signals interrupt."""

from __future__ import annotations

import os
import signal
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Barrier, Thread

import pytest

from syncbn.cli.signals import deferred_termination
from syncbn.files import atomic_write, require_file


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write(path: Path, source: Path | None = None) -> None:
    with atomic_write(path, source) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("number", "ignored"),
    [(signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGHUP, True)],
    ids=["TERM", "HUP", "nohup"],
)
def test_signal_ends_the_process_after_the_write(
    number: signal.Signals, ignored: bool, tmp_path: Path
) -> None:
    """Regression: a temporary file remained. Under nohup the process continues."""
    path = tmp_path / "out"
    if (child := os.fork()) == 0:
        try:
            signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
            with deferred_termination(), atomic_write(path) as file:
                file.write(b"first ")
                os.kill(os.getpid(), number)
                file.write(b"second")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if ignored else -number)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"first second"


def test_concurrent_writes_do_not_mix(tmp_path: Path) -> None:
    """Regression: both wrote to one temporary file, so the result mixed their contents."""
    path, barrier = tmp_path / "out", Barrier(2, timeout=20)
    texts = b"a" * 100_000, b"b" * 200_000

    def write_slowly(text: bytes) -> None:
        with atomic_write(path) as file:
            for half in (text[: len(text) // 2], text[len(text) // 2 :]):
                file.write(half)
                file.flush()
                barrier.wait()

    threads = [Thread(target=write_slowly, args=[text]) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the temporary name was predictable, and a link of this name was followed."""
    victim, path = tmp_path / "victim", tmp_path / "out"
    victim.write_bytes(b"old")
    monkeypatch.setattr("syncbn.files.secrets.token_hex", lambda size: "guessed")
    (tmp_path / ".syncbn-guessed.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write(path)
    assert victim.read_bytes() == b"old"


def test_special_files_raise(tmp_path: Path) -> None:
    """Regression: as root, output=/dev/null replaced the machine's device by a file."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        paths = [*tmp_path.iterdir(), Path("/dev/null")]
        for path in paths:
            before = path.lstat()
            with pytest.raises(ValueError, match=r"is a (device, a pipe or a socket|folder)"):
                require_file(path)
            with pytest.raises(ValueError, match="expected the name of a"), atomic_write(path):
                raise AssertionError("not reached")
            assert path.lstat() == before
    assert [*tmp_path.iterdir(), Path("/dev/null")] == paths


def test_impossible_paths_raise(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "far").symlink_to("no/such/file")
    for name in ("loop", "file/out", "no/out", "far"):
        with pytest.raises(ValueError, match=rf"{tmp_path / name}: "):
            require_file(tmp_path / name)


def test_link_to_a_file_is_kept(tmp_path: Path) -> None:
    link, file = tmp_path / "link", tmp_path / ("x" * 255)  # the longest name
    link.symlink_to(file)
    for _ in range(2):  # the file is absent in the first turn
        require_file(link)
        write(link)
        assert link.is_symlink()
        assert file.read_bytes() == b"new"


def test_new_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    for mask in (0o022, 0o027, 0o077):
        with umask(mask):
            write(tmp_path / f"{mask}")
            (tmp_path / "other").unlink(missing_ok=True)
            (tmp_path / "other").touch()
        assert mode_of(tmp_path / f"{mask}") == mode_of(tmp_path / "other")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_derived_file_is_not_more_readable_than_its_source(mode: int, tmp_path: Path) -> None:
    """Regression: a private checkpoint gave an output with the permissions of the umask."""
    source, out, old = tmp_path / "in", tmp_path / "out", tmp_path / "old"
    source.touch(mode)
    old.touch()
    old.chmod(0o666)
    with umask(0o022):
        write(out, source)
    write(old, source)
    # The owner can write the new file.
    assert mode_of(out) == mode_of(old) == mode | 0o600


def test_group_without_access_to_the_source_gets_none(tmp_path: Path) -> None:
    """Regression: members of an output's other group got the permissions of the source's group."""
    source = tmp_path / "in"
    source.touch(0o640)
    group = [group for group in (*os.getgroups(), 12345) if group != os.getegid()][:1]
    with suppress(PermissionError):  # root may set any group
        os.chown(source, -1, *group)
    with umask(0o022):
        write(tmp_path / "out", source)
    same = source.stat().st_gid == (tmp_path / "out").stat().st_gid
    assert mode_of(tmp_path / "out") == (0o640 if same else 0o600)


def test_existing_file_keeps_its_permissions_and_owner(tmp_path: Path) -> None:
    """Regression: root replaced a user's file by one that the user could not write."""
    path = tmp_path / "out"
    path.touch()
    with suppress(PermissionError):  # root may set any owner
        os.chown(path, 12345, 54321)
    path.chmod(0o664)
    before = path.stat()
    write(path)
    after = path.stat()
    assert after.st_ino != before.st_ino
    owners = [(status.st_uid, status.st_gid, status.st_mode) for status in (before, after)]
    assert owners[0] == owners[1]


def test_file_of_another_user_and_group() -> None:
    """A writer outside the file's group cannot keep the group; its group gets no more access."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        path = Path(folder, "out")
        path.touch()
        path.chmod(0o664)
        group = path.stat().st_gid
        if (child := os.fork()) == 0:
            status = 1
            try:
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setgid(12345)
                    os.setuid(12345)
                write(path)
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert mode_of(path) == (0o664 if path.stat().st_gid == group else 0o644)
