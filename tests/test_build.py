"""Installing with a compiler, without one, and with one that fails."""

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
from syncbn.kernels.cpu.source_hash import checksum
from tests.kernel_cases import needs_cpp

BUILT = cpu.PATH
ROOT = Path(__file__).resolve().parent.parent
# What is found of a syncbn without C++ kernels, and what becomes of layers in it.
PROGRAM = """
import json, torch, syncbn
from syncbn.cli import doctor
from syncbn.kernels import choose, cpu, reference
x = torch.randn(4, 3, 5, 5)
layer = syncbn.SyncBatchNorm2d(3)
layer(x).sum().backward()
layer.sync_kernel = "cpu"
try:
    layer(x)
except RuntimeError as error:
    message = str(error)
found = {
    "path": syncbn.__file__,
    "reference": choose("auto", x) is reference,
    "reason": cpu.describe(),
    "doctor": doctor.installation()["C++ kernels"],
    "message": message,
}
print(json.dumps(found))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the sources, for builds to leave this one alone."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("libsyncbn_cpu.*", "__pycache__")
    for folder in ("syncbn", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in ("hatch_build.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def wheel(checkout: Path, compiler: str) -> Path:
    """Build a wheel with a compiler."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    environment = {**os.environ, "CXX": compiler}
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=55
    )
    assert done.returncode == 0, done.stderr
    (path,) = (checkout / "dist").iterdir()
    return path


def test_the_library_is_of_these_sources() -> None:
    """Else every other test is of an old one: `pip install -e .` again."""
    if (compiler := hatch_build.find_compiler()) is None:
        assert "no C++ compiler" in cpu.describe()
        return
    assert hatch_build.fingerprint(compiler).encode() in cpu.PATH.read_bytes()
    assert cpu.describe() in cpu.LEVELS


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/no/such/compiler", "no C++ compiler was found"),
        ("false", "false -dumpmachine failed"),
        ("'g++", "CXX or CXXFLAGS cannot be read: No closing quotation"),
    ],
)
def test_without_a_compiler_there_is_the_reference(
    compiler: str, reason: str, checkout: Path
) -> None:
    path = wheel(checkout, compiler)
    assert path.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(path).namelist()
    assert "syncbn/kernels/cpu/libsyncbn_cpu.txt" in names
    assert not any(name.endswith((".so", ".cpp", ".h")) for name in names if "kernels" in name)
    installed = checkout / "site"
    zipfile.ZipFile(path).extractall(installed)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=installed,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["path"].startswith(str(installed))
    assert found["reference"]
    assert reason in found["reason"]
    assert reason in found["doctor"]
    assert found["message"].startswith("kernel 'cpu': there is no ")
    assert reason in found["message"]


@pytest.mark.skipif(hatch_build.find_compiler() is None, reason="there is no C++ compiler")
def test_with_a_compiler_a_wheel_carries_the_library(checkout: Path) -> None:
    for file in (BUILT, hatch_build.CHECKSUM):
        shutil.copy(file, checkout / file.relative_to(ROOT))
    path = wheel(checkout, os.environ.get("CXX", ""))
    assert "-py3-none-" in path.name
    assert not path.name.endswith("-any.whl")
    names = zipfile.ZipFile(path).namelist()
    assert {
        "syncbn/kernels/cpu/libsyncbn_cpu.so",
        "syncbn/kernels/cpu/libsyncbn_cpu.sha256",
    } <= set(names)
    assert not any(name.endswith((".txt", ".cpp", ".h")) for name in names if "kernels" in name)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return where the library is looked for."""
    path = tmp_path / "libsyncbn_cpu.so"
    monkeypatch.setattr(cpu, "PATH", path)
    cpu.load.cache_clear()
    yield path
    cpu.load.cache_clear()


def test_a_library_of_something_else_is_not_used(library: Path) -> None:
    library.write_bytes(b"not a library")
    library.with_suffix(".sha256").write_text(checksum(library))
    assert "cannot be used" in cpu.describe()
    with pytest.raises(RuntimeError, match=r"kernel 'cpu': .* cannot be used"):
        kernels.choose("cpu", torch.empty(1, 1))


@needs_cpp
@pytest.mark.parametrize("sources", ["none", "its own", "others"])
def test_a_library_of_other_sources_is_not_used(library: Path, sources: str) -> None:
    """After a pull, with functions of other arguments, it was a crash."""
    for file in (BUILT, hatch_build.CHECKSUM):
        shutil.copy(file, library.parent)
    if sources != "none":
        shutil.copytree(BUILT.parent / "csrc", library.parent / "csrc")
    if sources == "others":
        (library.parent / "csrc" / "more.h").write_text("// more")
    assert ("is of other sources" in cpu.describe()) == (sources == "others")


def damage(library: Path, how: str) -> None:
    """Change a library, and not its checksum."""
    size = library.stat().st_size
    match how:
        case "cut":
            os.truncate(library, size // 2)
        case "empty":
            os.truncate(library, 0)
        case "changed":
            with library.open("r+b") as file:
                file.seek(size // 2)
                byte = file.read(1)[0]
                file.seek(size // 2)
                file.write(bytes([byte ^ 1]))
        case "without a checksum":
            library.with_suffix(".sha256").unlink()
        case "a checksum of other bytes":
            library.with_suffix(".sha256").write_bytes(b"\xff\xfe\x80")


DAMAGES = ["cut", "empty", "changed", "without a checksum", "a checksum of other bytes"]


@needs_cpp
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_library_is_not_used(how: str, checkout: Path) -> None:
    """A truncated library ended every process that loaded it by SIGBUS."""
    for file in (BUILT, hatch_build.CHECKSUM):
        shutil.copy(file, checkout / file.relative_to(ROOT))
    damage(checkout / BUILT.relative_to(ROOT), how)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=checkout, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["path"].startswith(str(checkout))
    assert found["reference"]
    reason = "cannot be used: " if "checksum" in how else "is damaged: "
    assert reason in found["reason"]
    assert "install syncbn again" in found["reason"]
    assert found["doctor"] == found["reason"]
    assert found["message"].startswith(f"kernel 'cpu': {found['reason']}")


@pytest.mark.skipif(hatch_build.find_compiler() is None, reason="there is no C++ compiler")
def test_a_damaged_library_is_built_again(tmp_path: Path) -> None:
    """A library with the right mark was not built again after damage."""
    library = tmp_path / BUILT.name
    compiler = hatch_build.find_compiler()
    assert compiler is not None
    mark = hatch_build.fingerprint(compiler)
    for how in DAMAGES:
        for file in (BUILT, hatch_build.CHECKSUM):
            shutil.copy(file, tmp_path)
        assert hatch_build.is_built(library, mark)
        assert not hatch_build.is_built(library, f"{mark} of others")
        damage(library, how)
        assert not hatch_build.is_built(library, mark)


@needs_cpp
def test_the_linker_can_mix_up_no_instruction_sets(tmp_path: Path) -> None:
    """A weak symbol is taken from any of the objects; not inlined, AVX-512 would run everywhere."""
    compiler = hatch_build.find_compiler()
    assert compiler is not None
    out = tmp_path / "instance.o"
    source = BUILT.parent / "cpp" / "instance.cpp"
    flags = [*hatch_build.FLAGS.replace("-O3", "-O0").split(), "-DSYNCBN_KERNELS=kernels_baseline"]
    subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(out)], check=True, timeout=50)
    found = subprocess.run(["nm", "-C", str(out)], capture_output=True, text=True, check=True)
    assert "kernels_baseline" in found.stdout
    weak = [line for line in found.stdout.splitlines() if line[17:18] in "VWu"]
    # Of exceptions, which have no vectors.
    known = ("std::exception", "std::bad_alloc", "DW.ref.")
    assert [line for line in weak if not any(name in line for name in known)] == []


def test_a_wheel_is_named_after_the_processors_that_it_has_code_for() -> None:
    assert hatch_build.platform_tag("linux-x86_64") == "linux_x86_64"
    for_both = hatch_build.platform_tag("macosx-11.0-universal2")
    assert for_both == f"macosx_11_0_{platform.machine()}"
