"""The one folder of a job: chosen by rank 0, known to all ranks."""

from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from config import TrainConfig
from consistency import raise_on_all_ranks
from omegaconf import OmegaConf
from storage import writing

CHECKPOINT = "last.pt"


class RunDir(NamedTuple):
    """Where the job writes, and the checkpoint it continues from."""

    path: Path
    checkpoint: Path | None


def open_run_dir(cfg: TrainConfig) -> RunDir:
    """Find or make the folder of this job and save the configuration in it; a collective.

    ============ =============== ===============================================================
    ``resume``   ``run_dir``     folder
    ============ =============== ===============================================================
    null         null            a new ``runs/NAME/TIME``
    null         FOLDER          FOLDER, which must not hold a run
    ``auto``     null            the newest of ``runs/NAME`` with a checkpoint, or a new one
    ``auto``     FOLDER          FOLDER, continued if it has a checkpoint
    FILE         null            the folder of FILE
    FILE         FOLDER          FOLDER
    ============ =============== ===============================================================

    Args:
        cfg: the configuration; only rank 0's is used.

    Returns:
        The same on every rank. Only rank 0 may assume that the folder exists.

    Raises:
        ValueError: the folder holds another run, or cannot be made; on all ranks.
    """
    box: list[RunDir | None] = [None]
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            run = _choose(cfg)
            run.path.mkdir(parents=True, exist_ok=True)
            with writing(run.path / "config.yaml") as file:
                file.write(OmegaConf.to_yaml(OmegaConf.structured(cfg)).encode())
            box[0] = run
    dist.broadcast_object_list(box, src=0)
    chosen = box[0]
    assert chosen is not None
    return chosen


def _choose(cfg: TrainConfig) -> RunDir:
    home = Path("runs") / cfg.name
    folder = None if cfg.run_dir is None else Path(cfg.run_dir)
    if cfg.resume == "auto":
        if folder is None:
            # Names are times, so the last one is the newest.
            old = sorted(path.parent for path in home.glob(f"*/{CHECKPOINT}"))
            folder = old[-1] if old else _new(home)
        checkpoint = folder / CHECKPOINT
        return RunDir(folder, checkpoint if checkpoint.exists() else None)
    if cfg.resume is not None:
        checkpoint = Path(cfg.resume)
        if not checkpoint.is_file():
            raise ValueError(f"resume: {checkpoint} is not a file, expected a checkpoint or 'auto'")
        return RunDir(folder or checkpoint.parent, checkpoint)
    if folder is not None and (folder / CHECKPOINT).exists():
        raise ValueError(
            f"run_dir: {folder} holds a run already, expected a new folder; use resume=auto to "
            "continue that run, or another run_dir"
        )
    return RunDir(folder or _new(home), None)


def _new(home: Path) -> Path:
    """Make a folder named by the time; a second job of the same second gets the next name."""
    stamp, attempt = datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), 0
    while True:
        path = home / (f"{stamp}.{attempt}" if attempt else stamp)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            attempt += 1
        else:
            return path
