from __future__ import annotations

from pathlib import Path

import pytest

from tests.example.support import PROGRAM, entries, finish, launch

STEPS = ["experiment=digits_smoke", "model.width=4", "dtype=float64"]


@pytest.fixture(scope="session")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of four ranks on one host, over Gloo."""
    folder = tmp_path_factory.mktemp("one_host")
    steps = [*STEPS, "max_steps=20", f"run_dir={folder}"]
    finish(launch("torchrun", PROGRAM, *steps, cwd=folder, NPROC=4), limit=150)
    return losses(folder)


def losses(run: Path) -> list[float]:
    """Return the losses of a run, of the last line of each step."""
    return list({entry["step"]: entry["loss"] for entry in entries(run, "step")}.values())
