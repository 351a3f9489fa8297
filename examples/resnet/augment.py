"""Random changes of one image, written on numpy arrays ``[C, H, W]``."""

import numpy as np
from images import Pixels


def shift(image: Pixels, pad: int, rng: np.random.Generator) -> Pixels:
    """Move the image by up to ``pad`` pixels in each direction, filling with zeros.

    The same as padding by ``pad`` and cropping the original size at a random place.
    """
    _, height, width = image.shape
    top, left = rng.integers(0, 2 * pad + 1, size=2)
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    return padded[:, top : top + height, left : left + width]


def flip(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Mirror the image left to right with probability 1/2."""
    return image[:, :, ::-1] if rng.random() < 0.5 else image


def shift_digit(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Move an 8x8 digit by at most one pixel: more would cut strokes off."""
    return shift(image, 1, rng)


def shift_and_flip(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Pad by four, crop at random, mirror at random (He et al. 2015, section 4.2)."""
    return flip(shift(image, 4, rng), rng)
