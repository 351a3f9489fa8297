"""Lightning: synchronized layers as a plugin, recalibration as a callback.

Both work with ``lightning`` and with ``pytorch_lightning``. The two packages have different classes
of the same names, so import yours first if both are installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from torch import nn

from syncbn.calibration import CalibrationReport
from syncbn.distributed.groups import GroupLike
from syncbn.integrations.hooks import import_hook
from syncbn.integrations.recalibration import Recalibration
from syncbn.nn.adapters import Adapters
from syncbn.nn.module import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

#: Module of each package, and the oldest version with the hooks.
_PACKAGES = {"lightning.pytorch": "lightning>=2.0", "pytorch_lightning": "pytorch-lightning>=2.0"}


def _find_package() -> str:
    """Return the module of the imported package, or of an installed one."""
    for name in _PACKAGES:
        if name in sys.modules:
            return name
    for name in _PACKAGES:
        if find_spec(name.split(".")[0]) is not None:
            return name
    return "lightning.pytorch"


def _import_layer_sync(package: str) -> Any:
    return import_hook(_PACKAGES[package], f"{package}.plugins", "LayerSync", "apply", "revert")


_PACKAGE = _find_package()
_LayerSync: Any = _import_layer_sync(_PACKAGE)
_Callback: Any = import_hook(
    _PACKAGES[_PACKAGE], _PACKAGE, "Callback", "on_validation_epoch_start", "on_test_epoch_start"
)


class SyncBatchNormPlugin(_LayerSync):  # type: ignore[misc]
    """Synchronize the batch-norm layers of a model during ``trainer.fit``.

    The layers are converted before the strategy wraps the model and reverted at the end: the
    classes, tensors and names of the model are the original ones. Layers that were synchronized
    before stay so. DDP and FSDP strategies call this plugin; with another strategy, convert the
    model yourself.

    Args:
        process_group: ranks whose batches form one batch; see
            :func:`syncbn.convert_sync_batchnorm`, also for the further arguments.
        adapters: functions that replace the forward of layers, by class.
        normalization_batch: number of samples that are normalized together.

    Example::

        Trainer(strategy="ddp", plugins=[SyncBatchNormPlugin(process_group="node")])
    """

    def __init__(
        self,
        process_group: GroupLike = None,
        *,
        adapters: Adapters | None = None,
        normalization_batch: int | None = None,
    ) -> None:
        super().__init__()
        # The trainer accepts only instances of the class in the same package.
        for package in _PACKAGES:
            if package in sys.modules:
                _import_layer_sync(package).register(SyncBatchNormPlugin)
        self._process_group = process_group
        self._adapters = adapters
        self._normalization_batch = normalization_batch
        self._converted: list[nn.Module] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the layers of a model and return it; the trainer calls this on every rank."""
        before = set(_find_layers(model))
        convert_sync_batchnorm(
            model,
            self._process_group,
            adapters=self._adapters,
            normalization_batch=self._normalization_batch,
        )
        self._converted = [layer for layer in _find_layers(model) if layer not in before]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Restore the layers that :meth:`apply` converted, and return the model."""
        for layer in self._converted:
            revert_sync_batchnorm(layer)
        self._converted = []
        return model


def _find_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, SyncBatchNorm)]


class RecalibrationCallback(_Callback):  # type: ignore[misc]
    """Recalibrate the running statistics before every validation and test.

    For weights that were not trained with these statistics: averaged weights, Schedule-Free
    optimizers. List it after callbacks that switch the weights, such as ``WeightAveraging``; a
    module switches them in ``on_validation_model_eval``. The statistics stay after the evaluation.

    Args:
        batches: this rank's part of the calibration set, iterable many times; None for the training
            dataloader of the last ``fit``.
        options: arguments of :func:`syncbn.recalibrate`, such as ``num_samples=2048``.

    Attributes:
        report: result of the last recalibration, or None.
    """

    def __init__(self, batches: Iterable[Any] | None = None, **options: Any) -> None:
        super().__init__()
        self._recalibration = Recalibration(batches, options)
        self._loader: object = None
        self.report: CalibrationReport | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the training dataloader, which the trainer drops before a test."""
        self._loader = trainer.train_dataloader

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate, except in the sanity check of untrained weights."""
        # WeightAveraging switches the weights in this hook, after on_validation_start.
        if not trainer.sanity_checking:
            self._recalibrate(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate."""
        self._recalibrate(trainer, pl_module)

    def _recalibrate(self, trainer: Any, model: nn.Module) -> None:
        current = trainer.train_dataloader
        self.report = self._recalibration.run(model, self._loader if current is None else current)
