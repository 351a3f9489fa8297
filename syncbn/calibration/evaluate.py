"""Metrics over an evaluation set that is distributed over ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn.calibration.batches import Batches, count_samples
from syncbn.calibration.ranks import Ranks

#: Function of the model and a batch that returns means over the samples of the batch, by name.
Metric = Callable[[nn.Module, Any], Mapping[str, "float | Tensor"]]


def classification(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return the cross-entropy in nats and the accuracy of a classifier.

    Args:
        model: network that maps ``batch[0]`` to logits ``[N, classes, *]``.
        batch: ``(inputs, labels, ...)`` with labels int64 ``[N, *]``; later parts are ignored.

    Raises:
        ValueError: the batch has no labels.
    """
    if not (isinstance(batch, list | tuple) and len(batch) >= 2):
        raise ValueError(
            f"got a batch of type {type(batch).__name__} without labels; expected (inputs, "
            "labels), or another metric"
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
    """Return means of a metric over the samples of all ranks, each counted once.

    Args:
        model: network in evaluation mode, without DDP, since ranks may have different numbers of
            batches.
        batches: batches of this rank; may be empty.
        metric: metric to average.
        ranks: ranks that evaluate together; a collective.
        device: device of the batches.

    Raises:
        ValueError: no rank has samples; batches without tensors.
        RuntimeError: another rank has failed.
    """

    def run() -> tuple[int, dict[str, float]]:
        samples, sums = 0, defaultdict[str, float](float)
        for batch in Batches(batches, None, device):
            size = count_samples(batch)
            if size is None:
                raise ValueError(
                    f"got a batch of type {type(batch).__name__} without a tensor; expected "
                    "samples to count"
                )
            for name, value in metric(model, batch).items() if size else ():
                sums[name] += float(value) * size
            samples += size
        return samples, sums

    results = ranks.all_gather_result(run, "the evaluation")
    total = sum(samples for samples, _ in results)
    if not total:
        raise ValueError("got no samples to evaluate on any rank; expected at least one")
    names = dict.fromkeys(name for _, sums in results for name in sums)
    return {name: sum(sums.get(name, 0.0) for _, sums in results) / total for name in names}
