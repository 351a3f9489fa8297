"""Recalibration by a trainer's callback, from the trainer's own training data."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from syncbn.calibration import CalibrationReport, recalibrate


class Recalibration:
    """A recalibration with fixed options.

    Args:
        batches: this rank's part of the calibration set, iterable many times; None for the training
            data.
        options: arguments of :func:`syncbn.recalibrate`. A progress bar would break the bar of the
            trainer, so the default is ``progress=False``.

    Raises:
        TypeError: an option that :func:`syncbn.recalibrate` does not have.
    """

    def __init__(self, batches: Iterable[Any] | None, options: dict[str, Any]) -> None:
        inspect.signature(recalibrate).bind(None, batches, **options)
        self._batches = batches
        self._options = {"progress": False, **options}

    def run(self, model: nn.Module, loader: object) -> CalibrationReport:
        """Recalibrate a model.

        Args:
            model: model with the weights of the evaluation.
            loader: training data of the trainer, or None.

        Raises:
            ValueError: no batches were passed, and the trainer has no training data or several
                loaders.
        """
        batches = self._batches
        if batches is None:
            if loader is None or isinstance(loader, dict | list | tuple):
                raise ValueError(
                    f"got a trainer whose training data is {type(loader).__name__}; expected one "
                    "loader, or RecalibrationCallback(batches=...)"
                )
            batches = separate_loader(loader)
        return recalibrate(model, batches, **self._options)


def separate_loader(loader: Any) -> Any:
    """Return a loader of the same batches; iterating it does not disturb an iteration of the first.

    A trainer may evaluate in the middle of an epoch. Iterating a loader with persistent workers
    again would end the epoch: they serve one iteration. A loader of Accelerate also records its
    progress for gradient accumulation; its ``base_dataloader`` does not.
    """
    loader = getattr(loader, "base_dataloader", loader)
    if getattr(loader, "persistent_workers", False):
        loader = copy.copy(loader)
        loader._iterator = None
    return loader
