"""Loss and accuracy over samples, summed over ranks."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Totals(NamedTuple):
    """Means over ``samples`` samples of all ranks; NaN where there were none."""

    loss: float
    accuracy: float
    correct: int
    samples: int


class Meter:
    """Sums of loss, correct predictions and samples on this rank.

    The sums live on the device in float64, so that adding to them neither waits for the device nor
    loses samples; ranks may add different numbers of samples, or none.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Forget all samples."""
        self.sums.zero_()

    def add(self, logits: Tensor, labels: Tensor, mean_loss: Tensor) -> None:
        """Count one batch.

        Args:
            logits: ``[B, classes]``.
            labels: ``[B]``, int64.
            mean_loss: scalar, the mean over the batch.
        """
        count = torch.full_like(mean_loss, len(labels), dtype=torch.float64)
        correct = (logits.argmax(dim=1) == labels).sum()
        self.sums += torch.stack([mean_loss.detach() * count, correct, count])

    def totals(self) -> Totals:
        """Return the means over all ranks; a collective."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        loss, correct, count = sums.tolist()
        if count == 0:
            return Totals(math.nan, math.nan, 0, 0)
        return Totals(loss / count, correct / count, int(correct), int(count))
