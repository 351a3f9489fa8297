"""Base of the three data sets: shape, classes and reproducible augmentation."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

Pixels: TypeAlias = npt.NDArray[np.generic]
Augment: TypeAlias = Callable[[Pixels, np.random.Generator], Pixels]


class Images(Dataset[tuple[Tensor, int]]):
    """A labelled set of images of ``channels`` channels in ``num_classes`` classes.

    Augmentation draws from `generator`, a function of (seed, epoch, index) alone. So a sample looks
    the same whichever rank or worker process loads it: one process and eight ranks train on equal
    batches, and a run that resumes in the middle of an epoch goes on exactly.
    """

    def __init__(self, channels: int, num_classes: int, seed: int) -> None:
        self.channels = channels
        self.num_classes = num_classes
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of the next pass; call before iterating over the loader."""
        self._epoch = epoch

    def generator(self, index: int) -> np.random.Generator:
        """Return the random numbers of one sample in this epoch."""
        return np.random.default_rng((self._seed, self._epoch, index))

    def __len__(self) -> int:
        raise NotImplementedError


class ArrayImages(Images):
    """Images held in memory.

    Args:
        pixels: ``[N, C, H, W]``, any real dtype.
        labels: ``[N]`` integers in ``[0, num_classes)``.
        num_classes: number of classes.
        mean: ``[C]``, subtracted after augmentation, in units of ``pixels``.
        std: ``[C]``, divided by.
        augment: maps one image ``[C, H, W]`` to another; None leaves images unchanged.
        seed: seed of the augmentation.
    """

    def __init__(
        self,
        pixels: Pixels,
        labels: npt.NDArray[np.integer],
        num_classes: int,
        *,
        mean: npt.ArrayLike,
        std: npt.ArrayLike,
        augment: Augment | None,
        seed: int,
    ) -> None:
        super().__init__(pixels.shape[1], num_classes, seed)
        self._pixels = pixels
        self._labels = labels
        self._mean = np.asarray(mean, np.float32)[:, None, None]
        self._std = np.asarray(std, np.float32)[:, None, None]
        self._augment = augment

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the normalized image, float32 ``[C, H, W]``, and its label."""
        image = self._pixels[index]
        if self._augment is not None:
            image = self._augment(image, self.generator(index))
        normalized = (image.astype(np.float32) - self._mean) / self._std
        return torch.from_numpy(normalized), int(self._labels[index])
