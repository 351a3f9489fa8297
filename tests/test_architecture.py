"""House rules: imports, files, links, public names and their annotations."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import syncbn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "syncbn"
# Rows of the table in ARCHITECTURE.md, from the ground up.
PACKAGES = [
    tuple(re.findall(r"`(\w+)`", line.split("|")[1]))
    for line in (ROOT / "ARCHITECTURE.md").read_text().split("## Path")[0].splitlines()
    if line.startswith("| `")
]
LEVELS = {name: level for level, names in enumerate(PACKAGES) for name in names}


def parse_imports(path: Path) -> list[tuple[str, list[str]]]:
    """Return the imports of a file, also inside of functions: modules, and the names from each."""
    statements: list[tuple[str, list[str]]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            statements += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            statements.append((node.module, [alias.name for alias in node.names]))
    return statements


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def _full_names(module: str, names: list[str]) -> set[str]:
    return {module, *(f"{module}.{name}" for name in names)}


FILES = sorted(PACKAGE.rglob("*.py"))
STATEMENTS = {module_name(path): parse_imports(path) for path in FILES}
#: Names that each module imports: modules, and `module.name`.
IMPORTS = {
    importer: {full for module, names in statements for full in _full_names(module, names)}
    for importer, statements in STATEMENTS.items()
}


def package_of(module: str) -> str | None:
    """Return the package of a module; None for `syncbn` itself, which imports the public names."""
    root, _, rest = module.partition(".")
    name = rest.split(".")[0]
    return name if root == "syncbn" and name in LEVELS else None


def test_the_table_lists_every_package() -> None:
    packages = {module.split(".")[1] for module in IMPORTS if "." in module}
    assert packages == {*LEVELS}


def test_imports_point_down() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in names
        if (here := package_of(module)) and (there := package_of(name)) and here != there
        if LEVELS[there] >= LEVELS[here]
    ]
    assert wrong == []


def needed_modules(importer: str) -> set[str]:
    """Return the modules that a module needs: `from package import module` needs that module."""
    needed = set()
    for module, names in STATEMENTS[importer]:
        submodules = {f"{module}.{name}" for name in names} & STATEMENTS.keys()
        needed |= submodules
        if len(submodules) < max(len(names), 1):
            needed.add(module)
    return needed & STATEMENTS.keys() - {importer}


def test_no_import_circles() -> None:
    graph = {module: needed_modules(module) for module in STATEMENTS}
    while leaves := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_private_names_of_torch_distributed_stay_in_one_file() -> None:
    private = re.compile(r"torch\.distributed\.(.*\.)?_|torch\.testing\._internal")
    users = {module for module, names in IMPORTS.items() if any(map(private.match, names))}
    assert users <= {"syncbn.distributed.collectives"}


def test_hydra_stays_in_the_command_line() -> None:
    allowed = {"cli": {"hydra", "omegaconf", "rich"}, "calibration": {"rich"}}
    for module, names in IMPORTS.items():
        used = {name.split(".")[0] for name in names} & allowed["cli"]
        assert used <= allowed.get(package_of(module) or "", set()), module


def test_a_file_is_at_most_300_lines() -> None:
    assert [path for path in FILES if len(path.read_text().splitlines()) > 300] == []


def test_links_between_documents_resolve() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for text, link in re.findall(r"\[([^][]*)\]\(([^)#]+)\)", path.read_text()):
            assert link.startswith("http") or (path.parent / link).exists(), f"{path}: {link}"
            is_file = re.fullmatch(r"\w+\.py", text)
            assert not is_file or text == Path(link).name, f"{path}: [{text}]({link})"


def test_files_named_in_the_architecture_exist() -> None:
    """Regression: the table named files that a later commit had merged."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    names = re.findall(r"`([\w/.]+\.(?:py|h|cpp|md))`", text)
    folders = [PACKAGE, *(ROOT / name for name in ("configs", "docs", "examples", "tests"))]
    files = [str(path) for folder in folders for path in folder.rglob("*.*")]
    files += [str(path) for path in ROOT.glob("*.*")]
    missing = {n for n in names if not any(file.endswith(f"/{n}") for file in files)}
    assert len(names) > 20
    assert missing == set()


def test_public_names() -> None:
    classes = "CalibrationReport Fusion JoinableModel RankInfo RunningNorm SyncBatchNorm"
    layers = "SyncBatchNorm1d SyncBatchNorm2d SyncBatchNorm3d"
    functions = (
        "accumulate_statistics checkpoint_contexts convert_sync_batchnorm even_batches "
        "example_weighted frozen_statistics fuse global_mean init_process_group merge_over_ranks "
        "merge_statistics prior_mix recalibrate revert_sync_batchnorm sync_batch_norm"
    )
    assert syncbn.__all__ == f"{classes} {layers} {functions}".split()
    assert all(hasattr(syncbn, name) for name in syncbn.__all__)


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


# The packages whose names are re-exported for users.
PUBLIC = ["syncbn", *(f"syncbn.{name}" for name in ("calibration", "distributed", "inference"))]


def _annotated(module: Any) -> Iterator[tuple[str, Any]]:
    """Return functions, classes, methods and properties of a module that have public names."""
    for name, member in vars(module).items():
        if name.startswith("_") or not (inspect.isfunction(member) or inspect.isclass(member)):
            continue
        yield name, member
        for key, value in inspect.getmembers(member):
            yield f"{name}.{key}", value.fget if isinstance(value, property) else value


@pytest.mark.parametrize("module", PUBLIC)
def test_hints_of_public_names_resolve(module: str) -> None:
    """Regression: GroupLike was a string, and resolved only where DeviceMesh is imported."""
    unresolved = []
    for name, member in _annotated(importlib.import_module(module)):
        if not str(getattr(member, "__module__", "")).startswith("syncbn"):
            continue
        try:
            typing.get_type_hints(inspect.unwrap(member))
        except (NameError, AttributeError, TypeError) as error:
            unresolved.append(f"{name}: {error}")
    assert unresolved == []


def test_process_group_hint_lists_accepted_types() -> None:
    hints = typing.get_type_hints(syncbn.convert_sync_batchnorm)
    names = {getattr(kind, "__name__", "") for kind in typing.get_args(hints["process_group"])}
    assert names == {"str", "int", "Sequence", "DeviceMesh", "ProcessGroup", "NoneType"}
