"""Images in the layout of ImageNet: ``root/train/CLASS/*`` and ``root/val/CLASS/*``."""

import math
from pathlib import Path

import numpy as np
import torch
from config import DataConfig
from images import Images
from PIL import Image
from torch import Tensor

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
# Of the ImageNet training set, on the scale [0, 1].
MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]


class ImageFolder(Images):
    """Image files, decoded on access.

    Args:
        files: ``(path, label)`` of every image.
        num_classes: number of classes.
        size: side of the square images returned.
        augment: crop and flip at random instead of cropping the centre.
        seed: seed of the augmentation.
    """

    def __init__(
        self, files: list[tuple[Path, int]], num_classes: int, size: int, augment: bool, seed: int
    ) -> None:
        super().__init__(3, num_classes, seed)
        self._files = files
        self._size = size
        self._augment = augment

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the normalized image, float32 ``[3, size, size]``, and its label.

        Raises:
            RuntimeError: the file cannot be decoded.
        """
        path, label = self._files[index]
        image = _decode(path)
        if self._augment:
            image = random_resized_crop(image, self._size, self.generator(index))
        else:
            image = resize_and_crop(image, self._size)
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
        return torch.from_numpy((pixels - MEAN) / STD), label


def load(cfg: DataConfig, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """List the training and the validation images under ``cfg.root``.

    Args:
        cfg: ``root`` holds ``train`` and ``val``, each with one folder a class.
        seed: seed of the augmentation.

    Returns:
        ``(train, val)``; a class is the position of its folder in alphabetical order.

    Raises:
        ValueError: a folder is missing, holds no class folders, or a class has no image; or the
            classes of the two parts differ.
    """
    if cfg.root is None:
        raise ValueError("data.root: got null, expected the folder that holds 'train' and 'val'")
    classes, train = _list(Path(cfg.root) / "train")
    val_classes, val = _list(Path(cfg.root) / "val")
    if classes != val_classes:
        odd = sorted(set(classes) ^ set(val_classes))
        raise ValueError(
            f"{cfg.root}: 'train' has {len(classes)} classes and 'val' {len(val_classes)}, "
            f"expected the same ones; in only one of them: {', '.join(odd[:5])}"
        )
    return (
        ImageFolder(train, len(classes), cfg.image_size, cfg.augment, seed),
        ImageFolder(val, len(classes), cfg.image_size, False, seed),
    )


def _list(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, expected one folder of images per class in it")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise ValueError(f"{folder}: got no folders in it, expected one per class")
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            kinds = " ".join(sorted(SUFFIXES))
            raise ValueError(f"{folder / name}: got no image in it, expected files named *{kinds}")
        files += [(path, label) for path in found]
    return classes, files


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            image: Image.Image = file.convert("RGB")
    # SyntaxError is how Pillow reports some damaged files.
    except (OSError, SyntaxError, ValueError) as error:
        raise RuntimeError(f"{path}: got {error}, expected an image that Pillow can read") from None
    return image


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Cut out a random part, scale it to ``size`` and mirror it with probability 1/2.

    The part covers 8 to 100 % of the area with an aspect ratio of 3/4 to 4/3 (Szegedy et al. 2015).
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        # Very long images: the largest square in them.
        w = h = min(width, height)
    left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    part = image.crop((left, top, left + w, top + h)).resize(
        (size, size), Image.Resampling.BILINEAR
    )
    mirror = rng.random() < 0.5
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else part


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size / 0.875`` (256 for 224) and cut out the centre."""
    scale = size / 0.875 / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return scaled.crop((left, top, left + size, top + size))
