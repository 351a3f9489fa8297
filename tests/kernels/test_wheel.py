"""An installed wheel, used outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.transports import ROOT


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_of_an_installed_wheel_runs_in_an_empty_folder(tmp_path: Path) -> None:
    python("-m", "build", "--wheel", "--no-isolation", f"--outdir={tmp_path}", cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    configs = {f"syncbn/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert configs
    assert configs <= set(names)
    assert not any(name.startswith(("tests/", "examples/")) for name in names)

    installed, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    options = "--quiet", "--no-deps", f"--target={installed}"
    python("-m", "pip", "install", *options, str(wheel), cwd=empty)
    # PYTHONPATH precedes the environment's editable syncbn.
    program = "import syncbn; print(syncbn.__file__)"
    path = python("-c", program, cwd=empty, PYTHONPATH=str(installed))
    assert path.startswith(str(installed))
    python("-m", "syncbn.cli.doctor", "json=r.json", cwd=empty, PYTHONPATH=str(installed))
    assert [path.name for path in empty.iterdir()] == ["r.json"]
    report = json.loads((empty / "r.json").read_text())
    assert report["ranks"][0]["rank"] == 0
