"""Statistics of the test batch, mixed with the running ones as if those were samples, too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.calibration.layers import Layer
from syncbn.calibration.per_sample import precise
from syncbn.distributed.collectives import active_group, differentiable_all_reduce
from syncbn.inference.convert import convert_inference, reverted_after
from syncbn.inference.rule import Rule
from syncbn.moments import Moments, get_packed_size
from syncbn.nn.layer_state import layer_group
from syncbn.nn.module import SyncBatchNorm

M = TypeVar("M", bound=nn.Module)


@contextmanager
def prior_mix(model: nn.Module, pseudo_samples: float) -> Iterator[None]:
    """Mix the running statistics with those of each test batch, in the body.

    For data that is not quite what the model was trained on: noise, blur, another camera. A layer
    normalizes a batch of n samples with mean and variance::

        mean = N / (N + n) running_mean + n / (N + n) batch_mean
        var  = N / (N + n) running_var  + n / (N + n) batch_var          (biased, as in training)

    N = infinity is plain evaluation, N = 0 the normalization of training. The batch is that of
    training: of all ranks of its group for a synchronized layer, which then sends one message a
    forward, so that all ranks must run the model the same number of times, with or without samples;
    of this rank for ``nn.BatchNorm*``. Layers in training mode, buffers and ``state_dict`` are as
    ever.

    Args:
        model: with batch-norm layers that have running statistics, in evaluation mode.
        pseudo_samples: N, from 0 to infinity: how many test samples the running statistics are
            worth.

    Raises:
        ValueError: N is negative or NaN; no layers, or one follows a rule already.

    Example::

        with prior_mix(model, pseudo_samples=16), torch.no_grad():
            logits = model(images)

    Reference:
        Schneider et al., "Improving robustness against common corruptions by covariate shift
        adaptation", 2020, arXiv:2006.16971, section 3.
    """
    convert_prior_mix(model, pseudo_samples)
    with reverted_after(model):
        yield


def convert_prior_mix(model: M, pseudo_samples: float) -> M:
    """Do what :func:`prior_mix` does for good, in place; ``revert_inference`` is the inverse.

    Args:
        model: see :func:`prior_mix`.
        pseudo_samples: see :func:`prior_mix`.

    Returns:
        The model it was given. Copies and pickles of it follow the rule; a ``state_dict`` is that
        of the model without it.

    Raises:
        ValueError: see :func:`prior_mix`.
    """
    if not pseudo_samples >= 0:
        raise ValueError(f"got pseudo_samples={pseudo_samples}; expected 0 or more")
    return convert_inference(model, lambda layer: PriorMix(pseudo_samples))


class PriorMix(Rule):
    """The rule of one layer; see :func:`prior_mix`.

    Args:
        pseudo_samples: N.
    """

    def __init__(self, pseudo_samples: float) -> None:
        super().__init__()
        self.pseudo_samples = pseudo_samples

    @property
    def is_evaluation(self) -> bool:
        """Whether the running statistics are worth infinitely many samples."""
        return math.isinf(self.pseudo_samples)

    def statistics(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed mean and variance, ``[1, C]``."""
        message = torch.cat([_moments(x).pack(), layer.running_mean.new_tensor([len(x)]).double()])
        total = differentiable_all_reduce(
            message, _group(layer.module), f"prior_mix in {layer.name}"
        )
        moments, samples = Moments.unpack(total[:-1], x.shape[1]), total[-1]
        share = samples / (self.pseudo_samples + samples)
        old_mean, old_var = layer.running_mean.double(), layer.running_var.double()
        mean = old_mean + share * (moments.mean() - old_mean)
        var = old_var + share * (moments.variance() - old_var)
        return mean.unsqueeze(0), var.unsqueeze(0)

    def extra_repr(self) -> str:
        """Return the argument, for ``print(model)``."""
        return f"pseudo_samples={self.pseudo_samples}"


def _moments(x: Tensor) -> Moments:
    if not x.numel():
        # Zeros that depend on x: the backward pass of this rank must come here, too.
        zeros = x.double().sum().expand(get_packed_size(x.shape[1], torch.float64))
        return Moments.unpack(zeros, x.shape[1])
    n, rounded, var, rest = precise(x)
    mean = rounded.double() + rest
    pivot = mean.detach().mean(0)
    first, second = n * (mean - pivot).sum(0), n * (var + (mean - pivot).square()).sum(0)
    count = mean.new_tensor(float(n * len(x)))
    return Moments.from_pivot(count, pivot, first, second, two_parts=True)


def _group(module: _BatchNorm) -> dist.ProcessGroup | None:
    match module:
        case SyncBatchNorm():
            return layer_group(module)
        case nn.SyncBatchNorm():
            return active_group(module.process_group)
    return None
