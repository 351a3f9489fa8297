"""Hatchling build hook: compiles the C++ kernels into a library with a C interface, without torch.

Without a working compiler syncbn is installed without the library, and `syncbn-doctor` reports the
reason. CXX and CXXFLAGS are respected.
"""

from __future__ import annotations

import hashlib
import os
import runpy
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from platform import machine
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path(__file__).parent / "syncbn" / "kernels" / "cpu"
LIBRARY = KERNELS / "libsyncbn_cpu.so"
# The reason for a missing library.
REASON = LIBRARY.with_suffix(".txt")
# Not imported: the package needs torch, which may be missing during a build.
LIBRARY_FILES = runpy.run_path(str(KERNELS / "library.py"))
CHECKSUM = LIBRARY_FILES["checksum_path"](LIBRARY)

# No flag that changes results for NaN, infinities or subnormals, or that targets this machine only.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno"
WARNINGS = "-Wall -Wextra -Wno-psabi -Wno-unknown-warning-option"
X86_LEVELS = {
    "kernels_avx2": "-mavx2 -mfma -mf16c",
    "kernels_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c",
}


class CustomBuildHook(BuildHookInterface[Any]):
    """Adds the library, or the reason for its absence, to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library; a wheel that contains it gets a platform tag."""
        reason = build_if_changed(LIBRARY)
        REASON.unlink(missing_ok=True)
        if reason is None:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_tag(sysconfig.get_platform())}"
            self._add(LIBRARY, build_data)
            self._add(CHECKSUM, build_data)
        else:
            LIBRARY.unlink(missing_ok=True)
            CHECKSUM.unlink(missing_ok=True)
            REASON.write_text(f"{reason}\n")
            self.app.display_warning(f"syncbn without C++ kernels: {reason}")
            self._add(REASON, build_data)

    def _add(self, path: Path, build_data: dict[str, Any]) -> None:
        build_data["artifacts"].append(f"/{path.relative_to(self.root)}")


def platform_tag(platform: str) -> str:
    """Return the platform tag of a wheel.

    Args:
        platform: result of `sysconfig.get_platform`.
    """
    # Under a universal2 Python the library is still built for one processor.
    platform = platform.replace("universal2", machine())
    return platform.replace("-", "_").replace(".", "_")


def build_if_changed(library: Path) -> str | None:
    """Build the library unless it is up to date: same sources, compiler and flags.

    Returns:
        None, or the reason for a missing library.
    """
    try:
        compiler = find_compiler()
    except ValueError as error:
        return f"CXX or CXXFLAGS cannot be read: {error}"
    if compiler is None:
        return "no C++ compiler was found (g++, clang++ or the command in CXX)"
    mark = build_mark(compiler)
    if is_built(library, mark):
        return None
    try:
        build(library, compiler, mark)
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(error.cmd)} failed:\n{error.stderr}"
    return None


def is_built(library: Path, mark: str) -> bool:
    """Return whether a library contains a mark and is not damaged."""
    try:
        return mark.encode() in library.read_bytes() and bool(LIBRARY_FILES["is_intact"](library))
    except (OSError, ValueError):  # ValueError: the checksum file is no text
        return False


def find_compiler() -> list[str] | None:
    """Return the command of a C++ compiler, or None.

    Raises:
        ValueError: unbalanced quotes in CXX or CXXFLAGS.
    """
    # Parsed before the build, so that a bad value becomes a reason instead of an error.
    shlex.split(os.environ.get("CXXFLAGS", ""))
    if named := shlex.split(os.environ.get("CXX", "")):
        return named if shutil.which(named[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def build_mark(compiler: list[str]) -> str:
    """Return hashes of the sources and of the build settings; the library contains this text."""
    settings = repr([*compiler, os.environ.get("CXXFLAGS", ""), Path(__file__).read_text()])
    return (
        f"{LIBRARY_FILES['hash_sources'](KERNELS)}, "
        f"built as {hashlib.sha256(settings.encode()).hexdigest()}"
    )


def build(library: Path, compiler: list[str], mark: str = "") -> None:
    """Compile the kernels for every instruction set, and link the library.

    Raises:
        subprocess.CalledProcessError: the compiler failed.
    """
    target = _run([*compiler, "-dumpmachine"])
    levels = {"kernels_baseline": "", **(X86_LEVELS if target.startswith("x86_64") else {})}
    openmp = ["-fopenmp"] if _accepts(compiler, "-fopenmp") else []
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    command = [*compiler, *FLAGS.split(), *WARNINGS.split(), *openmp]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        units = [(KERNELS / "csrc" / "cpu.cpp", [f'-DSYNCBN_MARK="{mark}"'])]
        units += [
            (KERNELS / "csrc" / "isa_kernels.cpp", [f"-DSYNCBN_KERNELS={name}", *flags.split()])
            for name, flags in levels.items()
        ]
        objects = [f"{folder}/{i}.o" for i in range(len(units))]
        # All at once: three equal units, one after two, would leave a core of two idle.
        with ThreadPoolExecutor(len(units)) as pool:
            compiled = [
                pool.submit(_run, [*command, *flags, *extra, "-c", str(source), "-o", out])
                for (source, flags), out in zip(units, objects, strict=True)
            ]
            for unit in compiled:
                unit.result()
        linked = Path(folder) / library.name
        _run([*compiler, "-shared", *openmp, *extra, *objects, "-o", str(linked)])
        checksum = Path(folder) / "checksum"
        checksum.write_text(LIBRARY_FILES["checksum"](linked))
        # Processes that have loaded the old library keep it.
        linked.replace(library)
        # A process that starts between these two lines uses the reference kernels.
        checksum.replace(LIBRARY_FILES["checksum_path"](library))


def _accepts(compiler: list[str], flag: str) -> bool:
    program = "int main() { return 0; }"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*compiler, flag, "-x", "c++", "-", "-o", f"{folder}/out"],
            input=program, capture_output=True, text=True,
        )  # fmt: skip
    return done.returncode == 0


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    # make sanitize
    if reason := build_if_changed(LIBRARY):
        raise SystemExit(reason)
