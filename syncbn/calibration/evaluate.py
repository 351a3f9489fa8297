"""A metric over an evaluation set, before and after a calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn.calibration.batches import Batches, count_samples
from syncbn.calibration.ranks import Ranks

#: Called with the model and a batch; returns means over the samples of the batch, by name.
Metric = Callable[[nn.Module, Any], Mapping[str, "float | Tensor"]]


def classification(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return the cross-entropy, nats, and the accuracy of a classifier.

    Args:
        model: maps ``batch[0]`` to logits ``[N, classes, *]``.
        batch: ``(inputs, labels)``, labels int64 ``[N, *]``; what follows is ignored.

    Raises:
        ValueError: the batch has no labels.
    """
    if not (isinstance(batch, list | tuple) and len(batch) >= 2):
        raise ValueError(
            f"got a batch of type {type(batch).__name__} without labels; expected (inputs, "
            "labels), or a metric of your own"
        )
    inputs, labels = batch[:2]
    logits: Tensor = model(inputs)
    return {
        "cross-entropy": F.cross_entropy(logits, labels),
        "accuracy": (logits.argmax(1) == labels).double().mean(),
    }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Metric,
    ranks: Ranks,
    device: torch.device,
) -> dict[str, float]:
    """Return a metric over the samples of all ranks, each counted once.

    Args:
        model: in evaluation mode, not wrapped in DDP: ranks may have different numbers of batches.
        batches: of this rank; may be empty.
        metric: what to average.
        ranks: that evaluate together; every rank must call this.
        device: to move the batches to.

    Raises:
        ValueError: no rank has samples; batches without tensors.
        RuntimeError: another rank has failed.
    """
    sums: dict[str, float] = {}
    samples = 0

    def work() -> None:
        nonlocal samples
        for batch in Batches(batches, None, device):
            size = count_samples(batch)
            if size is None:
                raise ValueError(
                    f"got a batch of type {type(batch).__name__} without a tensor; expected "
                    "samples to count"
                )
            for name, value in metric(model, batch).items() if size else ():
                sums[name] = sums.get(name, 0.0) + float(value) * size
            samples += size

    ranks.agreed(work, "the evaluation")
    everyone = ranks.objects((samples, sums))
    total = sum(number for number, _ in everyone)
    if not total:
        raise ValueError("got no samples to evaluate on any rank; expected at least one")
    names = dict.fromkeys(name for _, found in everyone for name in found)
    return {name: sum(f.get(name, 0.0) for _, f in everyone) / total for name in names}
