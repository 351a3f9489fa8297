"""The statistic everything is built on: how many values, their sum, their sum of squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Relative rounding of a raw float64 sum of squares after a few additions (a unit is 1.1e-16).
ROUNDING = 1e-15
# The same for a two-part sum: 26 bits in the high part and 53 in the low part make a unit 2^-79.
# 128 units cover the additions of 1000 ranks.
TWO_PART_ROUNDING = 2.0**-72
# Dekker's constant: it splits the 53 bits of a float64 into two halves of 26 bits and a sign.
_SPLITTER = 2.0**27 + 1


def has_two_parts(dtype: torch.dtype) -> bool:
    """Return whether moments of inputs of this dtype are two-part sums."""
    return dtype is torch.float64


def get_packed_size(channels: int, dtype: torch.dtype) -> int:
    """Return the length of packed moments: ``4C + 1`` for float64 inputs, or ``2C + 1``."""
    return (4 if has_two_parts(dtype) else 2) * channels + 1


@dataclass(frozen=True)
class Moments:
    """Per-channel raw moments of a set of values; sets add, so ranks and batches combine exactly.

    Raw sums are used because they add in one all-reduce whose size does not depend on the number
    of ranks. They are float64 because raw float32 sums lose the variance to cancellation (7 % of
    it at mean/std = 1000): in float64 the relative error of the variance is about
    1e-16 (mean/std)^2, and counts are exact up to 2^53. Sending (mean, invstd, count) of every rank
    instead grows with the world size and recovers small variances through eps.

    Moments of float64 inputs are two-part sums, ``sum + sum_low`` and ``sum_sq + sum_sq_low``: the
    relative error of the variance is 2^-79 (mean/std)^2, or 2e-12 at mean/std = 1e6. The high part
    of a set has 26 bits, so high parts add without rounding while their total is below 2^27 times
    the smallest, and a plain all-reduce suffices. Beyond, the sets differ so much in size or mean
    that their variance dwarfs the rounding. Values above 1e150 overflow.

    Attributes:
        count: values per channel, float64 scalar tensor. May be zero.
        sum: sum of the values, float64, shape ``[C]``; or its high part.
        sum_sq: sum of the squared values, float64, shape ``[C]``; or its high part.
        sum_low: low part of the sum, float64, shape ``[C]``; None for sums of one part.
        sum_sq_low: low part of the sum of squares, likewise.
    """

    count: Tensor
    sum: Tensor
    sum_sq: Tensor
    sum_low: Tensor | None = None
    sum_sq_low: Tensor | None = None

    @staticmethod
    def unpack(vector: Tensor, channels: int) -> Moments:
        """Read the format of :meth:`pack`; its length decides between one part and two."""
        parts = vector[:-1].view(-1, channels).unbind()
        return Moments(vector[-1], *parts)

    @staticmethod
    def from_pivot(
        count: Tensor, pivot: Tensor, first: Tensor, second: Tensor, two_parts: bool
    ) -> Moments:
        """Return the raw moments of values from their sums around a pivot.

        Args:
            count: values per channel, float64 scalar.
            pivot: near the mean, float64, shape ``[C]``.
            first: sum of ``x - pivot``, float64, shape ``[C]``.
            second: sum of ``(x - pivot)^2``, float64, shape ``[C]``.
            two_parts: True for two-part sums.
        """
        if not two_parts:
            total = first + count * pivot
            return Moments(count, total, second + pivot * (first + total))
        moved, moved_low = _two_product(count, pivot)
        total, low = _two_sum(moved, first)
        low = low + moved_low
        # The sum of squares is second + pivot (first + total).
        both, both_low = _two_sum(total, first)
        square, square_low = _two_product(pivot, both)
        total_sq, low_sq = _two_sum(square, second)
        low_sq = low_sq + (square_low + pivot * (both_low + low))
        high, high_sq = _round_to_26_bits(total), _round_to_26_bits(total_sq)
        return Moments(count, high, high_sq, (total - high) + low, (total_sq - high_sq) + low_sq)

    def pack(self) -> Tensor:
        """Return the all-reduce payload, float64.

        One part: ``[sum (C) | sum_sq (C) | count (1)]``, shape ``[2C + 1]``.
        Two parts: ``[sum (C) | sum_sq (C) | sum_low (C) | sum_sq_low (C) | count (1)]``, shape
        ``[4C + 1]``.
        """
        parts = [self.sum, self.sum_sq]
        if self.sum_low is not None and self.sum_sq_low is not None:
            parts += [self.sum_low, self.sum_sq_low]
        return torch.cat([*parts, self.count.reshape(1)])

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets; both have one part, or both have two."""
        return Moments.unpack(self.pack() + other.pack(), self.sum.numel())

    def round_sums(self) -> tuple[Tensor, Tensor]:
        """Return the sum and the sum of squares, rounded to one float64, shape ``[C]`` each."""
        if self.sum_low is None or self.sum_sq_low is None:
            return self.sum, self.sum_sq
        return self.sum + self.sum_low, self.sum_sq + self.sum_sq_low

    def mean_and_m2(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the sum of squares around it, float64, shape ``[C]`` each.

        Both are zero for a count of zero. The sum of squares is zero below the rounding of the
        moments: a constant channel of value v would otherwise have a variance of up to 1e-15 v^2,
        far above eps for v = 1e6.
        """
        count = _positive(self.count)
        if self.sum_low is None or self.sum_sq_low is None:
            mean = self.sum / count
            return mean, _above(ROUNDING, self.sum_sq - self.sum * mean, self.sum_sq)
        # With m the rounded mean and r = sum - n m, exactly: the mean is m + r/n, and the sum of
        # squares around it is sum_sq - n m^2 - r (2m + r/n).
        rough = (self.sum + self.sum_low) / count
        product, product_low = _two_product(count, rough)
        rest = (self.sum - product) + (self.sum_low - product_low)
        shift = rest / count
        square, square_low = _two_product(rough, product)
        squares = (self.sum_sq - square) + (self.sum_sq_low - square_low)
        squares = squares - (rough * product_low + rest * (2 * rough + shift))
        return rough + shift, _above(TWO_PART_ROUNDING, squares, self.sum_sq)

    def mean(self) -> Tensor:
        """Return the mean, float64, shape ``[C]``; zero for a count of zero."""
        return self.mean_and_m2()[0]

    def variance(self, *, unbiased: bool = False) -> Tensor:
        """Return the variance, float64, shape ``[C]``; zero where it is undefined.

        Args:
            unbiased: divide by ``count - 1`` (running statistics) instead of ``count``
                (normalization).
        """
        count = (self.count - 1).clamp(min=1) if unbiased else _positive(self.count)
        return self.mean_and_m2()[1] / count


def add_packed(total: Tensor, packed: Tensor, channels: int) -> None:
    """Add packed moments to a total in place; the total keeps its number of parts.

    Args:
        total: ``[2C + 1]`` or ``[4C + 1]``.
        packed: ``[2C + 1]`` or ``[4C + 1]``.
        channels: C.
    """
    if packed.numel() != total.numel():
        moments = Moments.unpack(packed, channels)
        sums = moments.round_sums()
        two_parts = total.numel() > packed.numel()
        pivot = torch.zeros_like(moments.sum)
        packed = Moments.from_pivot(moments.count, pivot, *sums, two_parts).pack()
    total.add_(packed)


def _positive(count: Tensor) -> Tensor:
    # Not clamped: the count of a prior, or a weight, may be a fraction.
    return torch.where(count > 0, count, 1.0)


def _above(rounding: float, squares: Tensor, sum_sq: Tensor) -> Tensor:
    # A product, so that NaN stays NaN.
    return squares * (squares > rounding * sum_sq)


# Sums and products with their rounding errors (Knuth, The Art of Computer Programming, vol. 2,
# 4.2.2; Dekker, A floating-point technique for extending the available precision, 1971). They are
# identities of real numbers in plain operations, so autograd differentiates through them. Rounding
# by a view of the bits as integers would take fewer operations and have no gradient.


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded sum and its error."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded product and its error."""
    product = a * b
    a_high, b_high = _round_to_26_bits(a), _round_to_26_bits(b)
    a_low, b_low = a - a_high, b - b_high
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _round_to_26_bits(a: Tensor) -> Tensor:
    scaled = _SPLITTER * a
    return scaled - (scaled - a)
