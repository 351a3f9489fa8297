"""The kernel contract: local computations of batch normalization, without communication.

The moments of a rank and the two gradient sums are the only values that other ranks need. A caller
all-reduces them between the two steps of a pass::

    moments    -> all-reduce -> normalize              forward
    backward_reduce -> all-reduce -> backward_elemt    backward
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from syncbn.kernels.activations import Activation, activation_backward, unit_derivative
from syncbn.kernels.coefficients import affine

#: Requested gradients: of x, weight, bias and residual.
OutputMask: TypeAlias = tuple[bool, bool, bool, bool]
#: Gradients of x, weight, bias and residual, or None.
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class RunningStats(NamedTuple):
    """Running statistics, updated in place.

    Attributes:
        mean: running mean, any floating dtype, shape ``[C]``, or None.
        var: running unbiased variance, any floating dtype, shape ``[C]``, or None.
        num_batches_tracked: number of batches, int64 scalar, or None.
        momentum: weight of a batch; None for a cumulative average, which needs the counter.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.0


class NormalizeArgs(NamedTuple):
    """Arguments of a forward pass.

    Attributes:
        eps: constant added to the variance.
        weight: scale per channel, any floating dtype, shape ``[C]``, or None for ones.
        bias: shift per channel, any floating dtype, shape ``[C]``, or None for zeros.
        activation: last operation, or None; piecewise linear if there is a residual.
        running: running statistics to update, or None.
    """

    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    activation: Activation | None = None
    running: RunningStats | None = None


class Saved(NamedTuple):
    """Values of a forward pass that the backward pass reads.

    ``activation_values`` and ``layout`` are private to the kernel.

    Attributes:
        x: input, shape ``[N, C, *]``.
        weight: scale per channel, shape ``[C]``, or None.
        bias: shift per channel, shape ``[C]``, or None.
        statistics: ``[mean (C) | invstd (C) | count (1)]`` of the whole group, float64.
        activation_values: output or packed mask, after a residual and an activation. None without
            a residual: the input of the activation is recomputed from x.
        activation: last operation, or None.
        layout: key of the memory layout that ``activation_values`` refers to, or None.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    statistics: Tensor
    activation_values: Tensor | None
    activation: Activation | None
    layout: Any = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the values for ``ctx.save_for_backward``; the constructor takes them first."""
        return self[:5]

    def constants(self) -> tuple[Any, ...]:
        """Return the values that are no tensors; the constructor takes them last."""
        return self[5:]


class Reduced(NamedTuple):
    """Result of the reduction of a backward pass.

    Attributes:
        sums: ``[sum(dy) (C) | sum(dy * xhat) (C)]`` of this rank, float64, shape ``[2C]``; dy
            before the activation.
        dweight: gradient of the weight, its dtype, shape ``[C]``; None if not in the output mask.
        dbias: gradient of the bias, likewise.
        dresidual: gradient of the residual, dtype and shape of x; None if not in the output mask.
        dy: gradient of the output that ``backward_elemt`` reads.
        inplace_ok: True if the kernel allocated dy and does not return it as dresidual.
    """

    sums: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual: Tensor | None
    dy: Tensor
    inplace_ok: bool = False


class Kernel(ABC):
    """Local computations of batch normalization for one kind of device or one compiler."""

    def unsupported_reason(self, x: Tensor) -> str | None:
        """Return the reason why this kernel cannot take x, as the end of a sentence, or None."""
        return None

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """Return packed :class:`syncbn.moments.Moments` of x, shape ``[N, C, *]``.

        float64, ``[2C + 1]``; two-part sums for float64 inputs, ``[4C + 1]``. Squares have the
        compute dtype: float32 overflows for values 1e19 away from their mean.
        """

    @abstractmethod
    def normalize(
        self, x: Tensor, moments: Tensor, args: NormalizeArgs, residual: Tensor | None = None
    ) -> tuple[Tensor, Saved]:
        """Return ``act((x - mean) * invstd * weight + bias + residual)``; update running stats.

        Args:
            x: input, shape ``[N, C, *]``.
            moments: moments of the whole group, packed.
            args: the other arguments.
            residual: tensor of x's shape and dtype, or None.

        Returns:
            The output in x's dtype and layout, and the values for the backward pass.
        """

    @abstractmethod
    def backward_reduce(self, dy: Tensor, saved: Saved, output_mask: OutputMask) -> Reduced:
        """Return the sums over this rank's values, and the gradients that need no other rank.

        Args:
            dy: gradient of the output, shape and dtype of x, any strides.
            saved: second result of the forward pass.
            output_mask: requested gradients.
        """

    @abstractmethod
    def backward_elemt(self, saved: Saved, reduced: Reduced, sums: Tensor) -> Tensor:
        """Return dx in x's dtype and layout.

        ``dx = invstd * weight * (dy - sum(dy)/count - xhat * sum(dy * xhat)/count)``

        Args:
            saved: second result of the forward pass.
            reduced: result of :meth:`backward_reduce`.
            sums: ``reduced.sums`` summed over the group, float64, shape ``[2C]``.
        """

    def forward_local(
        self, x: Tensor, args: NormalizeArgs, residual: Tensor | None = None
    ) -> tuple[Tensor, Saved]:
        """Return the result of :meth:`normalize` with the moments of x: world size 1."""
        return self.normalize(x, self.moments(x), args, residual)

    def backward_local(self, dy: Tensor, saved: Saved, output_mask: OutputMask) -> Gradients:
        """Return dx, dweight, dbias and dresidual for world size 1; dx is always computed."""
        reduced = self.backward_reduce(dy, saved, output_mask)
        dx = self.backward_elemt(saved, reduced, reduced.sums)
        return dx, reduced.dweight, reduced.dbias, reduced.dresidual

    def unit_derivative(self, saved: Saved) -> Tensor:
        """Return where the derivative of a piecewise linear activation is 1: bool, shape of x."""
        assert saved.activation is not None
        z = saved.activation_values
        if z is None:
            z = affine(saved.x, saved.statistics, saved.weight, saved.bias)
        return unit_derivative(z, saved.activation)


def undo_activation(dy: Tensor, saved: Saved) -> tuple[Tensor, bool]:
    """Return dy before an activation behind a residual, and True if that is a new tensor.

    Without a residual dy is returned as it is: kernels recompute the input of the activation.

    Args:
        dy: gradient of the output, shape of x.
        saved: values of a forward pass whose ``activation_values`` are its output.
    """
    if saved.activation_values is None or saved.activation is None:
        return dy, False
    return activation_backward(dy, saved.activation_values, saved.activation), True


def parameter_gradients(
    sums: Tensor, saved: Saved, output_mask: OutputMask
) -> tuple[Tensor | None, Tensor | None]:
    """Return dweight and dbias: the gradient sums, rounded to the dtype of the parameter.

    Args:
        sums: sums over this rank, float64, shape ``[2C]``.
        saved: values of the forward pass.
        output_mask: requested gradients.
    """
    sum_dy, sum_dy_xhat = sums.split(sums.numel() // 2)
    weight, bias = saved.weight, saved.bias
    # Copies: the all-reduce may overwrite the sums.
    dweight = dbias = None
    if output_mask[1] and weight is not None:
        dweight = sum_dy_xhat.to(weight.dtype, copy=True)
    if output_mask[2] and bias is not None:
        dbias = sum_dy.to(bias.dtype, copy=True)
    return dweight, dbias
