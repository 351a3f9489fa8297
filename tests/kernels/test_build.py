"""Installation with a working compiler, without one, and with a failing one."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hatch_build
from syncbn import kernels
from syncbn.kernels import cpu
from syncbn.kernels.cpu.library import PATH, checksum
from tests.kernel_cases import needs_cpp
from tests.transports import ROOT

BUILT = PATH
# Prints the properties of an installation without C++ kernels.
PROGRAM = """
import json, torch, syncbn
from syncbn.cli import doctor
from syncbn.kernels import REFERENCE, cpu, select_kernel
x = torch.randn(4, 3, 5, 5)
layer = syncbn.SyncBatchNorm2d(3)
layer(x).sum().backward()
layer.impl = "cpu"
try:
    layer(x)
except RuntimeError as error:
    message = str(error)
output = {
    "path": syncbn.__file__,
    "reference": select_kernel("auto", x) is REFERENCE,
    "reason": cpu.describe(),
    "doctor": doctor.installation()["C++ kernels"],
    "message": message,
}
print(json.dumps(output))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the sources to build in."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("libsyncbn_cpu.*", "__pycache__")
    for folder in ("syncbn", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in ("hatch_build.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def run_python(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build_wheel(checkout: Path, out: Path, **environment: str) -> tuple[Path, set[str]]:
    """Return a wheel and the names of its files."""
    arguments = "-m", "build", "--wheel", "--no-isolation", f"--outdir={out}"
    run_python(*arguments, cwd=checkout, **environment)
    (path,) = out.glob("*.whl")
    return path, set(zipfile.ZipFile(path).namelist())


def copy_library(folder: Path) -> Path:
    """Copy the library and its checksum file; return the copy."""
    shutil.copy(hatch_build.CHECKSUM, folder)
    return Path(shutil.copy(BUILT, folder))


def check_reference(folder: Path) -> dict[str, str]:
    """Run PROGRAM with the package in a folder; check that it uses the reference kernel."""
    output: dict[str, str] = json.loads(run_python("-c", PROGRAM, cwd=folder))
    assert output["path"].startswith(str(folder))
    assert output["reference"]
    return output


def test_library_matches_the_sources() -> None:
    """A stale library would make every other test meaningless: run `pip install -e .`."""
    if (compiler := hatch_build.find_compiler()) is None:
        assert "no C++ compiler" in cpu.describe()
        return
    assert hatch_build.build_mark(compiler).encode() in BUILT.read_bytes()
    assert cpu.describe() in cpu.LEVELS


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/no/such/compiler", "no C++ compiler was found"),
        ("false", "false -dumpmachine failed"),
        ("'g++", "CXX or CXXFLAGS cannot be read: No closing quotation"),
    ],
)
def test_failed_build_returns_the_reason(
    compiler: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert reason in str(hatch_build.build_if_changed(tmp_path / "libsyncbn_cpu.so"))


def test_wheel_without_a_compiler_uses_the_reference(checkout: Path) -> None:
    path, names = build_wheel(checkout, checkout / "dist", CXX="/no/such/compiler")
    assert path.name.endswith("-py3-none-any.whl")
    assert "syncbn/kernels/cpu/libsyncbn_cpu.txt" in names
    assert not any(name.endswith((".so", ".cpp", ".h")) for name in names if "kernels" in name)
    installed = checkout / "site"
    zipfile.ZipFile(path).extractall(installed)
    output, reason = check_reference(installed), "no C++ compiler was found"
    assert reason in output["reason"]
    assert reason in output["doctor"]
    assert output["message"].startswith("kernel 'cpu': there is no ")
    assert reason in output["message"]


def test_command_of_an_installed_wheel_runs_in_an_empty_folder(tmp_path: Path) -> None:
    path, names = build_wheel(ROOT, tmp_path)
    if hatch_build.find_compiler() is not None:
        assert "-py3-none-" in path.name
        assert not path.name.endswith("-any.whl")
        library = "syncbn/kernels/cpu/libsyncbn_cpu"
        assert {f"{library}.so", f"{library}.sha256"} <= names
        assert not any(name.endswith((".txt", ".cpp", ".h")) for name in names if "kernels" in name)
    configs = {f"syncbn/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert configs
    assert configs <= names
    assert not any(name.startswith(("tests/", "examples/")) for name in names)

    installed, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    options = "--quiet", "--no-deps", f"--target={installed}"
    run_python("-m", "pip", "install", *options, str(path), cwd=empty)
    # PYTHONPATH precedes the environment's editable syncbn.
    arguments = "-m", "syncbn.cli.doctor", "json=r.json"
    run_python(*arguments, cwd=empty, PYTHONPATH=str(installed))
    assert [path.name for path in empty.iterdir()] == ["r.json"]
    report = json.loads((empty / "r.json").read_text())
    assert report["ranks"][0]["rank"] == 0
    program = "import syncbn; print(syncbn.__file__)"
    place = run_python("-c", program, cwd=empty, PYTHONPATH=str(installed))
    assert place.startswith(str(installed))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the path from which the library is loaded."""
    path = tmp_path / "libsyncbn_cpu.so"
    monkeypatch.setattr("syncbn.kernels.cpu.library.PATH", path)
    cpu.load.cache_clear()
    yield path
    cpu.load.cache_clear()


def test_file_that_is_no_library_is_rejected(library: Path) -> None:
    library.write_bytes(b"not a library")
    library.with_suffix(".sha256").write_text(checksum(library))
    assert "cannot be used" in cpu.describe()
    with pytest.raises(RuntimeError, match=r"kernel 'cpu': .* cannot be used"):
        kernels.select_kernel("cpu", torch.empty(1, 1))


@needs_cpp
@pytest.mark.parametrize("sources", ["none", "same", "changed"])
def test_library_of_other_sources_is_rejected(library: Path, sources: str) -> None:
    """Regression: after a pull, functions with other arguments crashed."""
    copy_library(library.parent)
    if sources != "none":
        shutil.copytree(BUILT.parent / "csrc", library.parent / "csrc")
    if sources == "changed":
        (library.parent / "csrc" / "new.h").write_text("// new")
    assert ("was built from other sources" in cpu.describe()) == (sources == "changed")


def damage(library: Path, fault: str) -> None:
    """Damage a library or its checksum file."""
    size = library.stat().st_size
    match fault:
        case "truncated":
            os.truncate(library, size // 2)
        case "empty":
            os.truncate(library, 0)
        case "changed":
            with library.open("r+b") as file:
                file.seek(size // 2)
                byte = file.read(1)[0]
                file.seek(size // 2)
                file.write(bytes([byte ^ 1]))
        case "no checksum":
            library.with_suffix(".sha256").unlink()
        case "binary checksum":
            library.with_suffix(".sha256").write_bytes(b"\xff\xfe\x80")


FAULTS = ["truncated", "empty", "changed", "no checksum", "binary checksum"]


@needs_cpp
@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_library_is_rejected(fault: str, library: Path) -> None:
    compiler = hatch_build.find_compiler()
    damage(copy_library(library.parent), fault)
    reason = cpu.describe()
    assert ("cannot be used: " if "checksum" in fault else "is damaged: ") in reason
    assert "install syncbn again" in reason
    # Regression: a damaged library with the right mark was not rebuilt.
    assert compiler is None or not hatch_build.is_built(library, hatch_build.build_mark(compiler))


@pytest.mark.skipif(hatch_build.find_compiler() is None, reason="there is no C++ compiler")
def test_library_of_another_mark_is_rebuilt(tmp_path: Path) -> None:
    compiler = hatch_build.find_compiler()
    assert compiler is not None
    library, mark = copy_library(tmp_path), hatch_build.build_mark(compiler)
    assert hatch_build.is_built(library, mark)
    assert not hatch_build.is_built(library, f"{mark} changed")


@needs_cpp
def test_isa_objects_have_no_weak_symbols(tmp_path: Path) -> None:
    """A linker takes a weak symbol from any object: a function that is not inlined could bring
    AVX-512 instructions to every processor."""
    compiler = hatch_build.find_compiler()
    assert compiler is not None
    out = tmp_path / "isa_kernels.o"
    source = BUILT.parent / "csrc" / "isa_kernels.cpp"
    flags = [*hatch_build.FLAGS.replace("-O3", "-O0").split(), "-DSYNCBN_KERNELS=kernels_baseline"]
    subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(out)], check=True, timeout=100)
    symbols = subprocess.run(["nm", "-C", out], capture_output=True, text=True, check=True).stdout
    assert "kernels_baseline" in symbols
    weak = [line for line in symbols.splitlines() if line[17:18] in "VWu"]
    # Exceptions contain no vector code.
    allowed = ("std::exception", "std::bad_alloc", "DW.ref.")
    assert [line for line in weak if not any(name in line for name in allowed)] == []


def test_platform_tag_names_the_processor() -> None:
    assert hatch_build.platform_tag("linux-x86_64") == "linux_x86_64"
    for_both = hatch_build.platform_tag("macosx-11.0-universal2")
    assert for_both == f"macosx_11_0_{platform.machine()}"
