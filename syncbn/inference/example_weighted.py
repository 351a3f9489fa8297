"""Expected statistics of a training batch that includes the test sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

from syncbn.calibration import CalibrationReport
from syncbn.inference.convert import convert_inference, revert_inference
from syncbn.inference.rule import EvalStatistics
from syncbn.nn.bn_layers import BNLayer
from syncbn.nn.sample_stats import sample_stats

M = TypeVar("M", bound=nn.Module)


@contextmanager
def example_weighted(
    model: nn.Module, batch_size: float, between: CalibrationReport | Mapping[str, Tensor]
) -> Iterator[None]:
    """Include each sample in the statistics that normalize it, in the body.

    For models trained with small batches. In training, a sample contributes 1/B of the statistics
    that normalize it; in plain evaluation, nothing, which for small B is a discrepancy between
    training and test. A sample with mean m and variance v is normalized with the expected
    statistics of a training batch that includes it::

        mean = m / B + (B - 1) / B running_mean
        var  = v / B + (B - 1) / B running_var + (B - 1) / B^2 ((m - running_mean)^2 - s^2)

    with s^2, the variance between the means of samples, from a calibration. So the weight, which
    the reference tunes on a validation set, follows from B. B = infinity is plain evaluation, B = 1
    instance normalization. Each sample is normalized separately: no communication, and outputs
    depend neither on the batch nor on the other ranks.

    Args:
        model: network in evaluation mode; its batch-norm layers have running statistics.
        batch_size: B, the number of samples normalized together in training, over all ranks if
            synchronized; from 1 to infinity.
        between: s^2 of every layer, as the report of :func:`syncbn.recalibrate`, or tensors ``[C]``
            by layer name, such as ``report.between()``. Layers that the calibration did not reach,
            or left alone, are unchanged.

    Raises:
        ValueError: B is less than 1 or NaN; s^2 of a layer is missing, of another shape, negative
            or not finite; no layers, or a layer has a rule already.

    Example::

        report = syncbn.recalibrate(model, loader)
        with example_weighted(model, batch_size=4, between=report), torch.no_grad():
            logits = model(images)

    Reference:
        Summers and Dinneen, arXiv:1906.03548 (2020), section 3.1, for the idea. Let B independent
        samples have means m_j and variances v_j, with sample i fixed. The batch has mean M =
        (sum of m_j) / B and variance (sum of v_j + m_j^2) / B - M^2. E[v_j] = var - s^2 and
        E[m_j^2] = mean^2 + s^2 for j != i give the formulas above.
    """
    convert_example_weighted(model, batch_size, between)
    try:
        yield
    finally:
        revert_inference(model)


def convert_example_weighted(
    model: M, batch_size: float, between: CalibrationReport | Mapping[str, Tensor]
) -> M:
    """Apply :func:`example_weighted` permanently, in place; ``revert_inference`` is the inverse.

    Returns:
        The same model. Copies and pickles keep the rule; the ``state_dict`` is unchanged.

    Raises:
        ValueError: invalid arguments; see :func:`example_weighted`.
    """
    if not batch_size >= 1:
        raise ValueError(f"got batch_size={batch_size}; expected 1 or more")
    if isinstance(between, CalibrationReport):
        values, excluded = between.between(), {*between.not_reached, *between.left_alone}
    else:
        values, excluded = dict(between), set()

    def make_rule(layer: BNLayer) -> EvalStatistics | None:
        if layer.name in excluded:
            return None
        checked = _check_between(values.get(layer.name), layer)
        # An infinite batch is plain evaluation.
        return None if math.isinf(batch_size) else ExampleWeighted(batch_size, checked)

    return convert_inference(model, make_rule)


class ExampleWeighted(EvalStatistics):
    """Inference rule of one layer for :func:`example_weighted`.

    Args:
        batch_size: number of samples normalized together in training, B.
        between: variance between the means of samples, s^2, shape ``[C]``.
    """

    between: Tensor

    def __init__(self, batch_size: float, between: Tensor) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.register_buffer("between", between, persistent=False)

    def statistics(self, layer: BNLayer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the expected mean and variance for each sample, float64 ``[N, C]``."""
        samples = sample_stats(x)
        weight = 1 / self.batch_size
        mean, var = layer.running_mean.double(), layer.running_var.double()
        shift = samples.exact_mean() - mean
        # s^2 is limited to the variance, which may be from another calibration than s^2.
        squares = shift.square() - self.between.double().minimum(var)
        expected_var = weight * samples.var + (1 - weight) * (var + weight * squares)
        return mean + weight * shift, expected_var

    def extra_repr(self) -> str:
        """Return the batch size for ``print(model)``."""
        return f"batch_size={self.batch_size}"


def _check_between(between: Tensor | None, layer: BNLayer) -> Tensor:
    """Return a copy of s^2 on the device of a layer."""
    if between is None:
        raise ValueError(
            f"{layer.name}: got no between-sample variance; expected one for each batch-norm layer "
            "(recalibrate the model as it is now, and pass its report)"
        )
    if between.shape != layer.running_mean.shape:
        raise ValueError(
            f"{layer.name}: got a between-sample variance of shape {tuple(between.shape)}; "
            f"expected {tuple(layer.running_mean.shape)}"
        )
    if not bool(((between >= 0) & between.isfinite()).all()):
        raise ValueError(
            f"{layer.name}: got a between-sample variance that is negative or not finite; expected "
            "the variance from a calibration with two or more samples"
        )
    return between.detach().to(layer.running_var, copy=True)
