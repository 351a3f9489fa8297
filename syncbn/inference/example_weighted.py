"""Statistics that a training batch with the test sample in it would be expected to have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

from syncbn.calibration import CalibrationReport
from syncbn.calibration.layers import Layer
from syncbn.calibration.per_sample import precise
from syncbn.inference.convert import convert_inference, reverted_after
from syncbn.inference.rule import Rule

M = TypeVar("M", bound=nn.Module)


@contextmanager
def example_weighted(
    model: nn.Module, batch_size: float, between: CalibrationReport | Mapping[str, Tensor]
) -> Iterator[None]:
    """Give each sample its share in the statistics that normalize it, in the body.

    For models trained with small batches. In training, a sample makes up 1/B of the batch that it
    is normalized with; in plain evaluation, nothing of it, which for small B is a difference
    between training and test. A sample with mean m and variance v of its own is normalized with
    what a training batch that it is in has on average::

        mean = m / B + (B - 1) / B running_mean
        var  = v / B + (B - 1) / B running_var + (B - 1) / B^2 ((m - running_mean)^2 - s^2)

    with s^2, the variance between the means of samples, from a calibration. So the weight, which
    the reference tunes on a validation set, follows from B. B = infinity is plain evaluation, B = 1
    instance normalization. Samples are normalized one by one: nothing is sent, and outputs depend
    neither on the batch nor on the other ranks.

    Args:
        model: with batch-norm layers that have running statistics, in evaluation mode.
        batch_size: B, from 1 to infinity: samples that were normalized together in training, on
            all ranks together if synchronized.
        between: s^2 of every layer: the report of :func:`syncbn.recalibrate`, or tensors ``[C]`` by
            the name of the layer, such as ``report.between()``. Layers that the calibration did not
            reach, or left alone, are left as they are.

    Raises:
        ValueError: B is less than 1 or NaN; s^2 of a layer is missing, of another shape, negative
            or not finite; no layers, or one follows a rule already.

    Example::

        report = syncbn.recalibrate(model, loader)
        with example_weighted(model, batch_size=4, between=report), torch.no_grad():
            logits = model(images)

    Reference:
        Summers and Dinneen, "Four things everyone should know to improve batch normalization",
        2020, arXiv:1906.03548, section 3.1, for the idea. With means m_j and variances v_j of B
        independent samples, of which j = i is given: the batch has mean (sum of m_j) / B, and
        variance (sum of v_j + m_j^2) / B less the square of that; E[v_j] = var - s^2 and
        E[m_j^2] = mean^2 + s^2 for the others give the above.
    """
    convert_example_weighted(model, batch_size, between)
    with reverted_after(model):
        yield


def convert_example_weighted(
    model: M, batch_size: float, between: CalibrationReport | Mapping[str, Tensor]
) -> M:
    """Do what :func:`example_weighted` does for good; ``revert_inference`` is the inverse.

    Args:
        model: see :func:`example_weighted`.
        batch_size: see :func:`example_weighted`.
        between: see :func:`example_weighted`.

    Returns:
        The model it was given. Copies and pickles of it follow the rule; a ``state_dict`` is that
        of the model without it.

    Raises:
        ValueError: see :func:`example_weighted`.
    """
    if not batch_size >= 1:
        raise ValueError(f"got batch_size={batch_size}; expected 1 or more")
    if isinstance(between, CalibrationReport):
        values, unknown = between.between(), {*between.not_reached, *between.left_alone}
    else:
        values, unknown = dict(between), set()

    def make(layer: Layer) -> Rule | None:
        if layer.name in unknown:
            return None
        return ExampleWeighted(batch_size, _checked(values.get(layer.name), layer))

    return convert_inference(model, make)


class ExampleWeighted(Rule):
    """The rule of one layer; see :func:`example_weighted`.

    Args:
        batch_size: B.
        between: s^2, ``[C]``.
    """

    between: Tensor

    def __init__(self, batch_size: float, between: Tensor) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.register_buffer("between", between, persistent=False)

    @property
    def is_evaluation(self) -> bool:
        """Whether a sample has no share."""
        return math.isinf(self.batch_size)

    def statistics(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the expected mean and variance of every sample, ``[N, C]``."""
        _, rounded, own_var, rest = precise(x)
        own, others = 1 / self.batch_size, 1 - 1 / self.batch_size
        mean, var = layer.running_mean.double(), layer.running_var.double()
        shift = rounded.double() + rest - mean
        # Of a variance that is not the calibration's, s^2 cannot be the larger part.
        squares = shift.square() - self.between.double().minimum(var)
        return mean + own * shift, own * own_var + others * (var + own * squares)

    def extra_repr(self) -> str:
        """Return the batch size, for ``print(model)``."""
        return f"batch_size={self.batch_size}"


def _checked(between: Tensor | None, layer: Layer) -> Tensor:
    """Return s^2 on the device of a layer.

    Raises:
        ValueError: see :func:`example_weighted`.
    """
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
            "that of a calibration with two or more samples"
        )
    return between.detach().to(layer.running_var, copy=True)
