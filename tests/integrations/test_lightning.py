"""Lightning's trainer on two ranks, with both names of the package."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import syncbn
from tests.integrations.forked import run_on_two_ranks
from tests.integrations.support import (
    BATCH,
    BOUND,
    LEARNING_RATE,
    PointNet,
    calibrate,
    check_training,
    initialize,
    make_dataset,
    mean_losses,
    state,
    train_whole,
)

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
DATA = make_dataset(3, 6)


def make_module(package: str) -> Any:
    lightning: Any = import_module(package)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = initialize(PointNet)
            self.losses: list[float] = []
            self.outputs: list[Tensor] = []
            self.kinds: set[type] = set()

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.kinds |= {type(layer) for layer in norms(self)}
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.outputs.append(self(batch[0]).clone())

        test_step = validation_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), LEARNING_RATE)

    return Module()


def norms(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def make_trainer(package: str, **options: Any) -> Any:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return import_module(package).Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        max_epochs=1,
        **dict.fromkeys(quiet, False),
        **options,
    )


def make_loader(rank: int) -> DataLoader[Any]:
    """Return every second sample, in order: Lightning's own sampler shuffles."""
    return DataLoader(DATA, BATCH, sampler=DistributedSampler(DATA, 2, rank, shuffle=False))


def _fit(rank: int, package: str, imported: list[str]) -> Any:
    for name in PACKAGES:
        if name not in imported:
            sys.modules.pop(name, None)
    sys.modules.pop("syncbn.integrations.lightning", None)
    from syncbn.integrations.lightning import SyncBatchNormPlugin

    module = make_module(package)
    layers = norms(module)
    plugin = SyncBatchNormPlugin(process_group="node")
    trainer = make_trainer(package, plugins=[plugin])
    trainer.fit(module, make_loader(rank))
    assert module.kinds == {syncbn.SyncBatchNorm1d}
    assert norms(module) == layers
    assert {type(layer) for layer in layers} == {nn.BatchNorm1d}
    assert not any(name.startswith("_syncbn") for layer in layers for name in vars(layer))
    return module.losses, state(module.net)


@pytest.mark.parametrize(
    ("package", "imported"), [*((name, [name]) for name in PACKAGES), (PACKAGES[1], PACKAGES)]
)
def test_two_ranks_equal_one_process(package: str, imported: list[str], tmp_path: Path) -> None:
    for name in imported:
        import_module(name)  # in this process, for the ranks to inherit it
    check_training(run_on_two_ranks(_fit, tmp_path, package, imported), PointNet, DATA)


def _evaluate_averages(rank: int, package: str) -> Any:
    from syncbn.integrations.lightning import RecalibrationCallback, SyncBatchNormPlugin

    average = import_module(f"{package}.callbacks").WeightAveraging()
    module, callback = make_module(package), RecalibrationCallback()
    trainer = make_trainer(
        package,
        plugins=[SyncBatchNormPlugin()],
        callbacks=[average, callback],
        val_check_interval=1,  # three times in the epoch, after the sanity check
    )
    reports_before_training = []
    module.on_train_start = lambda: reports_before_training.append(callback.report)
    trainer.fit(module, make_loader(rank), make_loader(rank))
    assert callback.report is not None
    assert reports_before_training == [None]
    validations = torch.cat(module.outputs)[-3 * BATCH :]
    module.outputs.clear()
    trainer.test(module, make_loader(rank), verbose=False)
    return module.losses, validations, torch.cat(module.outputs)


def test_recalibration_of_averaged_weights(tmp_path: Path) -> None:
    """The averages get the statistics of all data; training goes on undisturbed."""
    import_module(PACKAGES[0])
    answers = run_on_two_ranks(_evaluate_averages, tmp_path, PACKAGES[0])
    net = initialize(PointNet)
    steps: list[list[Tensor]] = []
    losses = train_whole(
        net, DATA, lambda: steps.append([p.detach().clone() for p in net.parameters()])
    )
    torch.testing.assert_close(mean_losses(answers), losses, rtol=0, atol=BOUND)
    with torch.no_grad():
        for parameter, values in zip(net.parameters(), zip(*steps, strict=True), strict=True):
            parameter.copy_(torch.stack(values).mean(0))
        calibrate(net, DATA.tensors[0])
        expected = net(DATA.tensors[0])
    for rank, (_, validated, tested) in enumerate(answers):
        torch.testing.assert_close(validated, expected[rank::2], rtol=0, atol=BOUND)
        torch.testing.assert_close(tested, expected[rank::2], rtol=0, atol=BOUND)
