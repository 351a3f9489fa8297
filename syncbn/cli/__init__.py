"""Commands; hydra is imported in this room only."""

from __future__ import annotations

from pathlib import Path


def config_path() -> str:
    """Return the folder of the hydra configs: in the package of a wheel, else of the checkout."""
    packaged = Path(__file__).resolve().parent.parent / "configs"
    return str(packaged if packaged.is_dir() else packaged.parent.parent / "configs")
