"""The trainer of transformers on two ranks."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

import syncbn
from tests.integrations.forked import run_on_two_ranks
from tests.integrations.support import (
    BATCH,
    BOUND,
    CLASSES,
    LEARNING_RATE,
    calibrate,
    check_training,
    initialize,
    make_dataset,
    mean_losses,
    state,
    train_whole,
)

DATA = make_dataset(3, 32, 32)


class Records(Dataset[dict[str, Tensor]]):
    """The samples of DATA by name."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, label = DATA[index]
        return {"pixel_values": x, "labels": label}


def make_resnet() -> Any:
    transformers: Any = import_module("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=CLASSES
    )
    return transformers.ResNetForImageClassification(config)


def make_trainer(model: Any, **options: Any) -> Any:
    transformers: Any = import_module("transformers")

    class Trainer(transformers.Trainer):  # type: ignore[misc]
        """Records losses in float64, which the trainer adds up in float32."""

        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(model, *args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            recorded[model.training].append(loss.item())
            return result

    recorded: dict[bool, list[float]] = {True: [], False: []}
    callbacks = options.pop("callbacks", [])
    arguments = transformers.TrainingArguments(
        output_dir=".",
        use_cpu=True,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        average_tokens_across_devices=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **{"optim": "sgd", **options},
    )
    trainer = Trainer(
        model, arguments, train_dataset=Records(), eval_dataset=Records(), callbacks=callbacks
    )
    trainer.recorded = recorded
    return trainer


def _train(rank: int) -> Any:
    model = syncbn.convert_sync_batchnorm(initialize(make_resnet))
    trainer = make_trainer(model)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    return trainer.recorded[True], state(model)


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    import_module("transformers.trainer")
    check_training(run_on_two_ranks(_train, tmp_path), make_resnet, DATA)


def _evaluate(rank: int) -> Any:
    from syncbn.integrations.transformers import RecalibrationCallback

    model = syncbn.convert_sync_batchnorm(initialize(make_resnet))
    callback = RecalibrationCallback()
    trainer = make_trainer(
        model,
        callbacks=[callback],
        eval_strategy="steps",
        eval_steps=1,
        optim="schedule_free_sgd",
    )
    trainer.train()
    assert callback.report is not None
    return trainer.recorded[True], trainer.recorded[False]


def test_recalibration_of_schedule_free_weights(tmp_path: Path) -> None:
    """Evaluations within the epoch, after each step; training goes on undisturbed."""
    import_module("transformers.trainer")
    schedulefree: Any = import_module("schedulefree")
    answers = run_on_two_ranks(_evaluate, tmp_path)
    net = initialize(make_resnet)
    optimizer = schedulefree.SGDScheduleFree(net.parameters(), LEARNING_RATE)
    optimizer.train()
    expected: list[float] = []

    def evaluate() -> None:
        optimizer.eval()
        calibrated = initialize(make_resnet)
        calibrated.load_state_dict(net.state_dict())
        with torch.no_grad():
            calibrate(calibrated, DATA.tensors[0])
            logits = calibrated(DATA.tensors[0]).logits
        loss = F.cross_entropy(logits, DATA.tensors[1])
        expected.append(loss.item())
        optimizer.train()

    losses = train_whole(net, DATA, evaluate, optimizer)
    torch.testing.assert_close(mean_losses(answers), losses, rtol=0, atol=BOUND)
    evaluations = torch.tensor([own for _, own in answers], dtype=torch.float64)
    means = evaluations.mean(0).view(len(expected), -1).mean(1).tolist()
    torch.testing.assert_close(means, expected, rtol=0, atol=BOUND)


def _evaluate_epochs(rank: int) -> tuple[int, int]:
    from syncbn.integrations.transformers import RecalibrationCallback

    calls: list[int] = []
    callback = RecalibrationCallback()
    run = callback._recalibration.run
    callback._recalibration.run = lambda *args: calls.append(1) or run(*args)  # type: ignore
    trainer = make_trainer(initialize(make_resnet), callbacks=[callback], eval_strategy="epoch")
    trainer.train()
    return len(calls), sum("eval_loss" in entry for entry in trainer.state.log_history)


def test_recalibration_once_per_epoch(tmp_path: Path) -> None:
    import_module("transformers.trainer")
    assert run_on_two_ranks(_evaluate_epochs, tmp_path) == [(1, 1)] * 2
