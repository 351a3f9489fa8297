"""The module of the node is compiled once, whoever asks and whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from syncbn.autograd import node_build
from tests.interpreted_driver import kept
from tests.node import layer, no_gpu
from tests.transports import ROOT

# What stands for a compiler: notes that it runs, does what the test says, and copies the module,
# which the other tests have had compiled.
COMPILER = """#!/bin/sh
echo run >> {folder}/runs
[ -e {folder}/does ] && . {folder}/does
while [ "$1" != -o ]; do shift; done
cp {module} "$2"
"""
PROGRAM = "from syncbn.autograd import node_build; print(node_build.library())"


@pytest.fixture(scope="module")
def module() -> str:
    """Return where the module is that the real compiler has made."""
    assert not isinstance(node_build.library(), str), node_build.library()
    return str(node_build.library().__file__)


@pytest.fixture
def compiler(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of a compiler, and of what is kept in ``kept``."""
    program = tmp_path / "c++"
    program.write_text(COMPILER.format(folder=tmp_path, module=module))
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    node_build.library.cache_clear()
    yield tmp_path
    node_build.library.cache_clear()


def runs(compiler: Path) -> int:
    return len((compiler / "runs").read_text().splitlines())


def files(compiler: Path) -> list[str]:
    return sorted(path.suffix for path in (compiler / "kept" / "syncbn").iterdir())


def start() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=-1, text=True)


def test_processes_that_come_together_compile_once(compiler: Path) -> None:
    (compiler / "does").write_text("sleep 1")
    processes = [start() for _ in range(3)]
    said = {process.communicate()[0] for process in processes}
    assert len(said) == 1
    assert "<module 'node' from" in said.pop()
    assert runs(compiler) == 1
    assert files(compiler) == ["", ".so"]


def test_a_process_that_is_killed_leaves_nothing_in_the_way(compiler: Path) -> None:
    (compiler / "does").write_text(f"echo $$ > {compiler}/pid; sleep 30")
    process = start()
    while not (compiler / "pid").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.communicate()
    os.kill(int((compiler / "pid").read_text()), signal.SIGKILL)
    (compiler / "does").unlink()
    assert not isinstance(node_build.library(), str)
    assert runs(compiler) == 2


def test_what_a_compiler_failed_with_is_kept(compiler: Path) -> None:
    (compiler / "does").write_text("echo no such header >&2; exit 1")
    assert node_build.describe() == "compiled when a GPU first needs it"
    for _ in range(2):
        node_build.library.cache_clear()
        said = node_build.library()
        assert said.startswith(f"{compiler / 'c++'} failed: see ")
        assert node_build.describe() == said
    assert runs(compiler) == 1
    assert files(compiler) == ["", ".txt"]
    (reason,) = (compiler / "kept" / "syncbn").glob("*.txt")
    assert "no such header" in reason.read_text()
    assert str(reason) in said

    reason.unlink()
    (compiler / "does").unlink()
    node_build.library.cache_clear()
    assert not isinstance(node_build.library(), str)
    assert node_build.describe() == "compiled"


@pytest.mark.parametrize(
    ("does", "code"),
    [
        ("kill -9 $$", -9),
        ("echo fatal error: Killed signal terminated program cc1plus >&2; exit 1", 1),
        ("echo No space left on device >&2; exit 1", 1),
    ],
)
def test_a_compiler_that_is_killed_may_succeed_another_time(
    compiler: Path, does: str, code: int
) -> None:
    (compiler / "does").write_text(does)
    assert node_build.library().startswith(f"{compiler / 'c++'} ended with {code}")
    assert files(compiler) == [""]


@pytest.mark.parametrize("name", ["CXX", "CXXFLAGS"])
def test_what_cannot_be_read(compiler: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "'g++")
    assert node_build.library() == node_build.describe() == "No closing quotation"


def test_no_compiler(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert node_build.library().startswith("no C++ compiler was found")
    assert node_build.describe() == node_build.library()


def test_no_place_for_it(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(compiler / "c++"))
    assert "Not a directory" in node_build.library()


def test_a_module_that_is_there_needs_no_lock(compiler: Path) -> None:
    """Its folder may be another user's, or part of an image."""
    assert not isinstance(node_build.library(), str)
    node_build.library.cache_clear()
    with patch.object(node_build, "_one_at_a_time", side_effect=PermissionError):
        assert not isinstance(node_build.library(), str)


def test_a_module_that_cannot_be_loaded(compiler: Path) -> None:
    assert not isinstance(node_build.library(), str)
    (path,) = (compiler / "kept" / "syncbn").glob("*.so")
    path.unlink()
    path.write_text("of another machine")
    assert "file too short" in start().communicate()[0]


def test_threads_that_come_together_have_one_module(compiler: Path) -> None:
    program = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from syncbn.autograd import node_build
together = Barrier(8)
def load(_):
    together.wait()
    return hasattr(node_build.library(), "Plans")
with ThreadPoolExecutor(8) as pool:
    print(all(pool.map(load, range(8))))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


def test_another_torch_has_another_module(compiler: Path) -> None:
    command = node_build._command()
    paths = {node_build._path(command), node_build._path([*command, "-g"])}
    with patch.object(torch, "__version__", "2.6.0"):
        paths.add(node_build._path(command))
    assert len(paths) == 3


@no_gpu
def test_without_the_module_there_is_the_function_in_python(compiler: Path) -> None:
    (compiler / "does").write_text("exit 1")
    with kept() as driver:
        made, x = layer(3), torch.randn(4, 3, 2, 2, requires_grad=True)
        for _ in range(3):
            y = made(x)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "SyncBatchNormFunctionBackward"
    assert driver.launched
