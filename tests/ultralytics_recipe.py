"""The recipe of docs/trainers.md for ultralytics: one epoch of a small YOLO in one process.

``python -m tests.ultralytics_recipe``, with ultralytics installed. CI does not run it: ultralytics
requires torchvision and OpenCV. Without torchvision, names and ultralytics' own suppression of
overlapping boxes replace it.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import types
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from tests.device import seeded
from tests.timm_sweep import TorchvisionNames

_PAGE = Path(__file__).resolve().parent.parent / "docs" / "trainers.md"
_IMAGES = 4


def import_ultralytics() -> None:
    """Import ultralytics, also without torchvision."""
    if find_spec("torchvision") is not None:
        return
    registry: Any = metadata
    version = registry.version
    registry.version = lambda name: "0.28.0" if name == "torchvision" else version(name)
    sys.meta_path.append(TorchvisionNames())
    suppress: Any = import_module("ultralytics.utils.nms").TorchNMS.nms
    torchvision: Any = import_module("torchvision")
    torchvision.ops = types.SimpleNamespace(nms=suppress)


def write_dataset(folder: Path) -> Path:
    """Write images with one box each, and return the description of the dataset."""
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for i in range(_IMAGES):
        pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=seeded(i))
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"{i}.png")
        (folder / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    path = folder / "data.yaml"
    path.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: box}}\n")
    return path


def layer_classes(model: nn.Module) -> set[str]:
    """Return the names of the classes of the batch-norm layers."""
    norm = nn.modules.batchnorm._BatchNorm
    return {type(layer).__name__ for layer in model.modules() if isinstance(layer, norm)}


def main() -> None:
    """Train, and print the classes of the layers in training and in the checkpoint."""
    section = _PAGE.read_text().split("\n## ultralytics")[1]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    names: dict[str, Any] = {"__name__": "recipe"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"YOLO_CONFIG_DIR": folder, "YOLO_OFFLINE": "true"}
        import_ultralytics()
        exec(code, names)
        options = {
            **{
                "model": "yolo11n.yaml",
                "data": str(write_dataset(Path(folder))),
                "project": folder,
            },
            **{"name": "run", "device": "cpu", "epochs": 1, "imgsz": 64, "batch": 2},
            **{"workers": 0, "amp": False, "plots": False},
        }
        trainer = names["SyncBatchNormTrainer"](overrides=options)
        trained: set[str] = set()
        trainer.add_callback(
            "on_train_batch_end", lambda trainer: trained.update(layer_classes(trainer.model))
        )
        trainer.train()
        saved = torch.load(trainer.last, weights_only=False)
        found = {"training": trained, "checkpoint": layer_classes(saved["ema"] or saved["model"])}
    print(found)
    assert all(classes == {"SyncBatchNorm2d"} for classes in found.values())


if __name__ == "__main__":
    main()
