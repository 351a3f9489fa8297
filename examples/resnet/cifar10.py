"""CIFAR-10, the binary distribution (cifar-10-batches-bin).

A file is a sequence of records of 3073 bytes: the label, then 32x32 pixels of the red, the green
and the blue plane. See https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from augment import shift_and_flip
from config import DataConfig
from images import ArrayImages

RECORD = 1 + 3 * 32 * 32
TRAIN_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)]
TEST_FILES = ["test_batch.bin"]
# Of the 50,000 training images, on the scale of the bytes.
MEAN = np.array([0.4914, 0.4822, 0.4465]) * 255
STD = np.array([0.2470, 0.2435, 0.2616]) * 255


def load(cfg: DataConfig, seed: int) -> tuple[ArrayImages, ArrayImages]:
    """Read the training and the test set from ``cfg.root``.

    Args:
        cfg: ``root`` is the folder with the ``.bin`` files.
        seed: seed of the augmentation.

    Returns:
        ``(train, test)``, images ``[3, 32, 32]``.

    Raises:
        ValueError: the folder or a file is missing, or a file is not a whole number of records
            with labels 0 to 9.
    """
    root = Path(cfg.root or "")
    if cfg.root is None or not root.is_dir():
        raise ValueError(
            f"data.root: {cfg.root} is not a folder, expected the one that holds "
            f"{TRAIN_FILES[0]} ... {TEST_FILES[0]} (unpack cifar-10-binary.tar.gz)"
        )

    def images(names: list[str], augment: bool) -> ArrayImages:
        records = np.concatenate([_read(root / name) for name in names])
        return ArrayImages(
            records[:, 1:].reshape(-1, 3, 32, 32),
            records[:, 0],
            10,
            mean=MEAN,
            std=STD,
            augment=shift_and_flip if augment else None,
            seed=seed,
        )

    return images(TRAIN_FILES, cfg.augment), images(TEST_FILES, False)


def _read(path: Path) -> npt.NDArray[np.uint8]:
    """Return the records of a file, ``[N, 3073]``."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a batch of CIFAR-10 in binary form")
    size = path.stat().st_size
    if size == 0 or size % RECORD:
        raise ValueError(
            f"{path}: got {size} bytes, expected a positive multiple of {RECORD} "
            "(the binary distribution of CIFAR-10, not the Python one, and a complete download)"
        )
    records = np.fromfile(path, np.uint8).reshape(-1, RECORD)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path}: got label {records[:, 0].max()}, expected 0 to 9")
    return records
