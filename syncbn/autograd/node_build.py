"""The extension module of `node.cpp`, compiled when it is first needed.

Such modules belong to one version of torch and of Python, and the wheels of syncbn serve all of
them. So it is compiled as Triton's kernels are: once, for what is there, and kept where torch keeps
extensions (`TORCH_EXTENSIONS_DIR`). Where that fails, what it failed with is kept instead.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent
_FLAGS = "-std=c++20 -O2 -fPIC -shared -fvisibility=hidden"
_LOADING = threading.Lock()
# What compilers say where they were killed, or had no room.
_FOR_NOW = "killed", "no space left", "out of memory", "memory exhausted"
_LIBRARIES = "-ltorch -ltorch_cpu -ltorch_python -lc10"


@cache
def library() -> Any:
    """Return the module, or why there is none; compile it, unless that has been tried before.

    Processes that come at the same time wait for the first of them.
    """
    try:
        command = _command()
        path = _path(command)
        if not path.exists() and not _reason(path).exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(path.parent / "lock"):
                if not path.exists() and not _reason(path).exists():
                    _compile(command, path)
        return _load(path) if path.exists() else _failed(path)
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        return f"{error}"


def describe() -> str:
    """Return whether the module is there, or why not; compile nothing."""
    try:
        path = _path(_command())
        if path.exists():
            return found if isinstance(found := library(), str) else "compiled"
        return _failed(path) if _reason(path).exists() else "compiled when a GPU first needs it"
    except (OSError, RuntimeError, ValueError) as error:
        return f"{error}"


def _command() -> list[str]:
    """Return how the module is compiled, but for where to.

    Raises:
        RuntimeError: there is no compiler.
        ValueError: a quotation in CXX or CXXFLAGS does not end.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    compilers = [named] if named else [["c++"], ["g++"], ["clang++"]]
    compiler = next((command for command in compilers if shutil.which(command[0])), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (g++ or clang++, or what CXX names)")
    home = Path(torch.__file__).parent
    headers = home / "include", home / "include/torch/csrc/api/include"
    return [
        *compiler,
        *shlex.split(os.environ.get("CXXFLAGS", "")),
        # After those, for the last of two standards counts.
        *_FLAGS.split(),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *[f"-isystem{folder}" for folder in (*headers, sysconfig.get_path("include"))],
        f"{_HERE / 'node.cpp'}",
        f"-L{home / 'lib'}",
        *_LIBRARIES.split(),
    ]


def _path(command: list[str]) -> Path:
    """Return where the module is, or will be: another one for whatever it depends on."""
    # Of several machines that share a folder, each may have another libc.
    of = torch.__version__, torch.version.git_version, platform.libc_ver()
    found = hashlib.sha256(repr([command, of, sysconfig.get_config_var("SOABI")]).encode())
    for source in [_HERE / "node.cpp", *sorted((_HERE / "cpp").glob("*.h"))]:
        found.update(source.read_bytes())
    cached = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cached) / "torch_extensions"
    return Path(extensions) / "syncbn" / f"node-{found.hexdigest()[:16]}.so"


def _reason(path: Path) -> Path:
    return path.with_suffix(".txt")


def _failed(path: Path) -> str:
    first, *_ = _reason(path).read_text().splitlines()
    return f"{first}: see {_reason(path)}, and delete it to try again"


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    # Not on Windows, where nothing asks for the module.
    import fcntl

    with lock.open("a") as file:
        # Some file systems of a network have no locks; all would compile then.
        with suppress(OSError):
            # Until the file is closed, or the process ends, however it does.
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(command: list[str], path: Path) -> None:
    """Have the module there, whole, or the reason why not.

    Raises:
        RuntimeError: memory, or the disk, did not suffice, and may do so another time.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, said = Path(folder, path.name), Path(folder, "said")
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode < 0 or any(words in done.stderr.lower() for words in _FOR_NOW):
            last = done.stderr.strip().splitlines()[-1:]
            raise RuntimeError(f"{command[0]} ended with {done.returncode}: {''.join(last)}")
        if done.returncode > 0:
            said.write_text(f"{command[0]} failed\n{shlex.join(done.args)}\n{done.stderr}")
            said.replace(_reason(path))
        else:
            made.replace(path)


def _load(path: Path) -> Any:
    spec = spec_from_file_location("node", path, loader=ExtensionFileLoader("node", str(path)))
    assert spec is not None
    assert spec.loader is not None
    # Python would give a thread the module that another has not filled yet.
    with _LOADING:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    return module
