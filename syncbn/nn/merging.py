"""Statistics of the union of several populations, from the statistics of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_MEAN, _VAR, _COUNTER = "running_mean", "running_var", "num_batches_tracked"


def merge_statistics(
    state_dicts: Sequence[Mapping[str, Tensor]], counts: Sequence[float]
) -> dict[str, Tensor]:
    """Return the batch-norm statistics of the union of the populations of several models.

    Averaging the variances of models drops the variance between their means. With
    ``w_i = counts[i] / sum(counts)``::

        mean = sum_i w_i mean_i
        var  = sum_i w_i (var_i + (mean_i - mean)^2)          (law of total variance)

    Args:
        state_dicts: state dicts of models with the same batch-norm layers, such as the clients of
            federated averaging or ranks that trained with local batch norm.
        counts: size of the population of each model, in the same unit, such as samples.

    Returns:
        ``running_mean``, ``running_var`` and ``num_batches_tracked`` (the sum) of every layer, in
        the dtypes and on the devices of the first state dict, for
        ``model.load_state_dict(merged, strict=False)``.

    Raises:
        ValueError: no state dict; another number of counts; a count that is not positive and
            finite; no statistics; layers or shapes that differ between the state dicts.
    """
    if not state_dicts or len(state_dicts) != len(counts):
        raise ValueError(
            f"got {len(state_dicts)} state dicts and {len(counts)} counts; expected one count for "
            "each of one or more state dicts"
        )
    for i, count in enumerate(counts):
        if not (count > 0 and math.isfinite(count)):
            raise ValueError(f"got counts[{i}] = {count}; expected a positive finite number")
    prefixes = [name.removesuffix(_MEAN) for name in state_dicts[0] if name.endswith(_MEAN)]
    if not prefixes:
        raise ValueError(
            "got state dicts without running statistics; expected names that end in running_mean"
        )
    merged: dict[str, Tensor] = {}
    for i, state in enumerate(state_dicts):
        _check_same_layers(state_dicts[0], state, i)
    weights = torch.tensor([float(count) for count in counts], dtype=torch.float64)
    weights = (weights / weights.sum()).unsqueeze(1)
    for prefix in prefixes:
        means, variances = (
            torch.stack([state[prefix + name].detach().double().cpu() for state in state_dicts])
            for name in (_MEAN, _VAR)
        )
        # Around the first mean: a weighted sum of the means would lose digits.
        mean = means[0] + (weights * (means - means[0])).sum(0)
        var = (weights * (variances + (means - mean).square())).sum(0)
        first = state_dicts[0]
        merged[prefix + _MEAN] = mean.to(first[prefix + _MEAN])
        merged[prefix + _VAR] = var.to(first[prefix + _VAR])
        if (name := prefix + _COUNTER) in first:
            counters = [state[name].to(first[name]) for state in state_dicts]
            merged[name] = torch.stack(counters).sum(0)
    return merged


def _check_same_layers(first: Mapping[str, Tensor], state: Mapping[str, Tensor], i: int) -> None:
    """Check that a state dict has the statistics of the first one, in the same shapes.

    Raises:
        ValueError: a name is in one of them only, or shapes differ.
    """
    suffixes = _MEAN, _VAR, _COUNTER
    names, expected = ({n for n in s if n.endswith(suffixes)} for s in (state, first))
    if difference := sorted(names ^ expected):
        raise ValueError(
            f"got {', '.join(difference)} in only one of state_dicts[0] and state_dicts[{i}]; "
            "expected models with the same batch-norm layers"
        )
    for name in sorted(names):
        if state[name].shape != first[name].shape:
            raise ValueError(
                f"got {name} of shape {tuple(state[name].shape)} in state_dicts[{i}] and "
                f"{tuple(first[name].shape)} in state_dicts[0]; expected equal shapes"
            )
