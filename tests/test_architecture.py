"""The house rules that can be checked by reading the source."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

import syncbn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "syncbn"

# Rows of the table in ARCHITECTURE.md, from the ground up.
ROOMS = [
    tuple(re.findall(r"`(\w+)`", line.split("|")[1]))
    for line in (ROOT / "ARCHITECTURE.md").read_text().split("## Path")[0].splitlines()
    if line.startswith("| `")
]


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def target(module: str) -> str | None:
    """Return the room that an import is from; the package itself is the public face of all."""
    parts = module.split(".")
    if parts[0] != "syncbn" or len(parts) < 2:
        return None
    is_room = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()
    return parts[1] if is_room else None


def floor(name: str) -> int:
    """Return the floor of a room; a room that is not in ROOMS is an error."""
    return next(i for i, names in enumerate(ROOMS) if name in names)


def test_every_room_has_its_floor() -> None:
    rooms = {room(path) for path in sources()} - {"__init__"}
    assert rooms == {name for names in ROOMS for name in names}


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md")), ids=str
)
def test_links_between_papers_resolve(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    for module in imports(path):
        there = target(module)
        if there is None or there == here:
            continue
        assert floor(there) < floor(here), f"{here} imports {module}"


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Return the modules of the package that a file imports, inside of functions, too."""
    found = set(imports(path)) & modules
    # `from package import module` needs the module alone.
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def test_no_import_circles() -> None:
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources()
    }
    graph = {name: imported_modules(path, {*names}) - {name} for name, path in names.items()}
    while leaves := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_of_torch_distributed_stay_in_one_file(path: Path) -> None:
    if path == PACKAGE / "distributed" / "collectives.py":
        return
    for module in imports(path):
        private = any(part.startswith("_") for part in module.split(".")[1:])
        assert not (module.startswith("torch.distributed") and private), module
        assert not module.startswith("torch.testing._internal"), module


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_hydra_stays_in_the_command_line(path: Path) -> None:
    allowed = {"cli": ("hydra", "omegaconf", "rich"), "calibration": ("rich",)}
    for module in imports(path):
        name = module.split(".")[0]
        if name in ("hydra", "omegaconf", "rich"):
            assert name in allowed.get(room(path), ()), module


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_at_most_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def test_public_names() -> None:
    wanted = [
        "CalibrationReport",
        "Fusion",
        "RankInfo",
        "SyncBatchNorm",
        "SyncBatchNorm1d",
        "SyncBatchNorm2d",
        "SyncBatchNorm3d",
        "accumulate_statistics",
        "checkpoint_contexts",
        "convert_sync_batchnorm",
        "fuse",
        "init_process_group",
        "recalibrate",
        "revert_sync_batchnorm",
        "sync_batch_norm",
    ]
    assert syncbn.__all__ == wanted
    assert all(hasattr(syncbn, name) for name in wanted)


@pytest.mark.parametrize("name", syncbn.__all__)
def test_public_annotations_can_be_evaluated(name: str) -> None:
    """An alias that is a string raises NameError where its names are not imported."""
    public = getattr(syncbn, name)
    members = [member for _, member in inspect.getmembers(public, inspect.isroutine)]
    for function in (public, *members):
        if str(getattr(function, "__module__", None)).startswith("syncbn"):
            get_type_hints(function)


def test_import_needs_torch_alone() -> None:
    """In a fresh interpreter where everything optional fails to import."""
    program = """
import sys
optional = "triton mpi4py greenlet hydra omegaconf rich matplotlib sklearn numpy.ma"
for name in optional.split():
    sys.modules[name] = None
before = set(sys.modules)
import torch
torch_brings = set(sys.modules)
import syncbn
loaded = {name.split(".")[0] for name in set(sys.modules) - torch_brings}
assert loaded <= {"syncbn"} | set(sys.stdlib_module_names) | {"torch"}, loaded
syncbn.SyncBatchNorm2d(3)(torch.randn(2, 3, 4, 4)).sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
