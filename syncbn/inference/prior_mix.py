"""Running statistics as a prior, updated with the statistics of each test batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.distributed.collectives import differentiable_all_reduce
from syncbn.distributed.groups import active_group
from syncbn.inference.convert import convert_inference, revert_inference
from syncbn.inference.rule import EvalStatistics
from syncbn.moments import Moments, get_packed_size
from syncbn.nn.bn_layers import BNLayer
from syncbn.nn.layer_state import layer_group
from syncbn.nn.module import SyncBatchNorm
from syncbn.nn.sample_stats import sample_stats

M = TypeVar("M", bound=nn.Module)


@contextmanager
def prior_mix(model: nn.Module, pseudo_samples: float) -> Iterator[None]:
    """Mix the running statistics with the statistics of each test batch, in the body.

    For test data with a covariate shift: noise, blur, another camera. A layer normalizes a batch of
    n samples with mean and variance::

        mean = N / (N + n) running_mean + n / (N + n) batch_mean
        var  = N / (N + n) running_var  + n / (N + n) batch_var          (biased, as in training)

    N = infinity is plain evaluation, N = 0 the normalization of training. The batch of a
    synchronized layer is the batch of all ranks of its group: one all-reduce per forward, so all
    ranks must run the model the same number of times, with or without samples. ``nn.BatchNorm*``
    uses the batch of its rank. Layers in training mode, buffers and ``state_dict`` are unchanged.

    Args:
        model: network in evaluation mode; its batch-norm layers have running statistics.
        pseudo_samples: N, the weight of the running statistics in samples, from 0 to infinity.

    Raises:
        ValueError: N is negative or NaN; no layers, or a layer has a rule already.

    Example::

        with prior_mix(model, pseudo_samples=16), torch.no_grad():
            logits = model(images)

    Reference:
        Schneider et al., "Improving robustness against common corruptions by covariate shift
        adaptation", 2020, arXiv:2006.16971, section 3.
    """
    convert_prior_mix(model, pseudo_samples)
    try:
        yield
    finally:
        revert_inference(model)


def convert_prior_mix(model: M, pseudo_samples: float) -> M:
    """Apply :func:`prior_mix` permanently, in place; ``revert_inference`` is the inverse.

    Returns:
        The same model. Copies and pickles keep the rule; the ``state_dict`` is unchanged.

    Raises:
        ValueError: invalid arguments; see :func:`prior_mix`.
    """
    if not pseudo_samples >= 0:
        raise ValueError(f"got pseudo_samples={pseudo_samples}; expected 0 or more")
    is_plain = math.isinf(pseudo_samples)
    return convert_inference(model, lambda _: None if is_plain else PriorMix(pseudo_samples))


class PriorMix(EvalStatistics):
    """Inference rule of one layer for :func:`prior_mix`.

    Args:
        pseudo_samples: weight of the running statistics in samples, N.
    """

    def __init__(self, pseudo_samples: float) -> None:
        super().__init__()
        self.pseudo_samples = pseudo_samples

    def statistics(self, layer: BNLayer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed mean and variance, float64 ``[1, C]``."""
        payload = torch.cat([_moments(x).pack(), layer.running_mean.new_tensor([len(x)]).double()])
        total = differentiable_all_reduce(
            payload, _group(layer.module), f"prior_mix in {layer.name}"
        )
        moments, samples = Moments.unpack(total[:-1], x.shape[1]), total[-1]
        share = samples / (self.pseudo_samples + samples)
        old_mean, old_var = layer.running_mean.double(), layer.running_var.double()
        mean = old_mean + share * (moments.mean() - old_mean)
        var = old_var + share * (moments.variance() - old_var)
        return mean.unsqueeze(0), var.unsqueeze(0)

    def extra_repr(self) -> str:
        """Return the argument for ``print(model)``."""
        return f"pseudo_samples={self.pseudo_samples}"


def _moments(x: Tensor) -> Moments:
    if not x.numel():
        # Zeros that depend on x, so that the backward pass of this rank reaches the all-reduce.
        zeros = x.double().sum().expand(get_packed_size(x.shape[1], torch.float64))
        return Moments.unpack(zeros, x.shape[1])
    samples = sample_stats(x)
    n, mean = samples.n, samples.exact_mean()
    pivot = mean.detach().mean(0)
    first, second = n * (mean - pivot).sum(0), n * (samples.var + (mean - pivot).square()).sum(0)
    count = mean.new_tensor(float(n * len(x)))
    return Moments.from_pivot(count, pivot, first, second, two_parts=True)


def _group(module: _BatchNorm) -> dist.ProcessGroup | None:
    match module:
        case SyncBatchNorm():
            return layer_group(module)
        case nn.SyncBatchNorm():
            return active_group(module.process_group)
    return None
