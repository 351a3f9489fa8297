"""transformers: recalibration as a callback of its ``Trainer``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from syncbn.calibration import CalibrationReport
from syncbn.integrations.hooks import import_hook
from syncbn.integrations.recalibration import Recalibration

_REQUIREMENT = "transformers>=4.50"
_TrainerCallback: Any = import_hook(
    _REQUIREMENT, "transformers", "TrainerCallback", "on_step_end", "on_epoch_end"
)
import_hook(_REQUIREMENT, "transformers", "TrainerControl", "should_evaluate")


class RecalibrationCallback(_TrainerCallback):  # type: ignore[misc]
    """Recalibrate the running statistics before every evaluation during ``trainer.train()``.

    For weights that were not trained with these statistics: averaged weights, Schedule-Free
    optimizers. ``Trainer`` has no hook before an evaluation that you start yourself; call
    :func:`syncbn.recalibrate` there. The statistics stay after the evaluation.

    Args:
        batches: this rank's part of the calibration set, iterable many times; None for the training
            dataloader.
        options: arguments of :func:`syncbn.recalibrate`, such as ``num_samples=2048``.

    Attributes:
        report: result of the last recalibration, or None.
    """

    def __init__(self, batches: Iterable[Any] | None = None, **options: Any) -> None:
        super().__init__()
        self._recalibration = Recalibration(batches, options)
        self.report: CalibrationReport | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        """Recalibrate if an evaluation follows."""
        if not control.should_evaluate:
            return
        # Schedule-Free: the trainer switches to the weights of the evaluation after this hook.
        if callable(switch := getattr(values.get("optimizer"), "eval", None)):
            switch()
        self.report = self._recalibration.run(values["model"], values.get("train_dataloader"))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        """Recalibrate if an evaluation follows."""
        self.on_step_end(args, state, control, **values)
