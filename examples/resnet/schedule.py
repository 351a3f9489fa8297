"""Learning rate: linear warm-up, then half a cosine, a step at a time."""

import math
from dataclasses import dataclass

from config import OptimizerConfig


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step, and of nothing else.

    No state is saved: a resumed run computes the rate of its next step. ``max_steps`` ends
    a run early without squeezing the schedule, so a short run is the beginning of the long one.

    Attributes:
        peak: rate at the end of the warm-up.
        warmup_steps: steps in which the rate grows linearly to ``peak``.
        total_steps: steps at which the rate reaches zero.
    """

    peak: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        """Return the rate to use for ``step`` (the first is 0)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def build_schedule(
    cfg: OptimizerConfig, *, steps_per_epoch: int, epochs: int, global_batch: int
) -> Schedule:
    """Turn epochs into steps and scale the rate to the batch.

    Args:
        cfg: ``lr`` is meant for a global batch of ``lr_batch`` samples and grows in proportion to
            the real one (Goyal et al. 2017, section 2.1); with ``lr_batch`` null it is used as is.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: length of the whole schedule.
        global_batch: samples in a step, over all ranks.

    Returns:
        The schedule.
    """
    scale = 1.0 if cfg.lr_batch is None else global_batch / cfg.lr_batch
    return Schedule(
        peak=cfg.lr * scale,
        warmup_steps=round(cfg.warmup_epochs * steps_per_epoch),
        total_steps=epochs * steps_per_epoch,
    )
