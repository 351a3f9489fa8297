"""Statistics of the union of several populations, from the statistics of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.distributed import collectives
from syncbn.distributed.groups import GroupLike, active_group, resolve_group
from syncbn.moments import Moments

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


@torch.no_grad()
def merge_over_ranks(model: nn.Module, count: float, process_group: GroupLike = None) -> None:
    """Give the model of every rank the statistics of the union of the ranks' populations.

    The formula of :func:`merge_statistics`, in one all-reduce for all layers, in place: for ranks
    that trained with local batch norm, where averaging would drop the variance between ranks.
    ``num_batches_tracked`` is unchanged.

    Args:
        model: module with batch-norm layers of torch or of this library; the same on every rank.
        count: size of the population of this rank, such as its number of samples; zero for none.
            Fractions lose digits of the variance if means are far from zero.
        process_group: ranks to merge; as in :func:`syncbn.convert_sync_batchnorm`. A collective.

    Raises:
        ValueError: a count that is negative or not finite; no layer with statistics; on CPU, counts
            that are zero on every rank (on CUDA, the statistics are unchanged then).
        RuntimeError: the transport failed, or the ranks have different layers.
    """
    if not 0 <= count < math.inf:
        raise ValueError(f"got count {count}; expected a finite number of at least 0")
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    layers: list[tuple[str, Tensor, Tensor]] = [
        (name, module.running_mean, module.running_var)
        for name, module in modules
        if module.running_mean is not None and module.running_var is not None
    ]
    if not layers:
        raise ValueError("got a model without running statistics; expected a batch-norm layer")
    means = torch.cat([mean.double() for _, mean, _ in layers])
    variances = torch.cat([var.double() for _, _, var in layers])
    size = means.new_full((), count)
    zeros = torch.zeros_like(means)
    moments = Moments.from_pivot(size, means, zeros, size * variances, two_parts=True).pack()
    names = ", ".join(f"{name} {len(mean)}" for name, mean, _ in layers)
    group = active_group(resolve_group(process_group))
    union = Moments.unpack(
        collectives.all_reduce(moments, group, f"merge_over_ranks of {names}"), len(means)
    )
    if union.count.is_cpu and not union.count:
        raise ValueError("got count 0 on every rank; expected a positive count on some rank")
    sizes = [len(mean) for _, mean, _ in layers]
    merged = union.mean().split(sizes), union.variance().split(sizes)
    for (_, mean, var), new_mean, new_var in zip(layers, *merged, strict=True):
        mean.copy_(torch.where(union.count > 0, new_mean, mean))
        var.copy_(torch.where(union.count > 0, new_var, var))


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
