"""Commands, the only users of hydra."""

from __future__ import annotations

import importlib.util
from pathlib import Path

if missing := [name for name in ("hydra", "rich") if importlib.util.find_spec(name) is None]:
    raise ImportError(
        f"the commands of syncbn need {' and '.join(missing)}: pip install 'syncbn[cli]'"
    )


def config_path() -> str:
    """Return the folder of the hydra configs, in the package (wheel) or in the checkout."""
    packaged = Path(__file__).resolve().parent.parent / "configs"
    return str(packaged if packaged.is_dir() else packaged.parent.parent / "configs")
