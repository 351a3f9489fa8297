"""The handwritten digits bundled with scikit-learn: 1797 grey images of 8x8 pixels, ten classes."""

import numpy as np
from augment import shift_digit
from config import DataConfig
from images import ArrayImages
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def load(cfg: DataConfig, seed: int) -> tuple[ArrayImages, ArrayImages]:
    """Return the training and the test set; no download, no files.

    Args:
        cfg: ``split_seed`` and ``test_fraction`` define the split, which keeps the proportion of
            every class and does not depend on the seed of the run.
        seed: seed of the augmentation.

    Returns:
        ``(train, test)``, images ``[1, 8, 8]``.
    """
    digits = load_digits()
    pixels = digits.images[:, None].astype(np.float32)
    train, test = train_test_split(
        np.arange(len(pixels)),
        test_size=cfg.test_fraction,
        stratify=digits.target,
        random_state=cfg.split_seed,
    )
    mean, std = [pixels[train].mean()], [pixels[train].std()]

    def images(rows: np.ndarray, augment: bool) -> ArrayImages:
        return ArrayImages(
            pixels[rows],
            digits.target[rows],
            10,
            mean=mean,
            std=std,
            augment=shift_digit if augment else None,
            seed=seed,
        )

    return images(train, cfg.augment), images(test, False)
