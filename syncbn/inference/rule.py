"""Inference rules: the statistics of one layer in evaluation, and layers that use them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.kernels.coefficients import forward_coefficients
from syncbn.nn.bn_layers import BNLayer
from syncbn.nn.fx_call import record_call
from syncbn.ops.functional import finish_forward
from syncbn.ops.validation import check_activation, check_input, check_parameters

# One derived class per base class, so that layers of one class still have one class.
_DERIVED: dict[type[_BatchNorm], type[_BatchNorm]] = {}


class EvalStatistics(nn.Module, ABC):
    """Inference rule: the statistics that a layer normalizes an input with in evaluation.

    A module, so that its tensors move with the model; it adds nothing to a ``state_dict``.

    Attributes:
        layer_name: name of the layer, for error messages.
    """

    layer_name: str = ""

    @abstractmethod
    def statistics(self, layer: BNLayer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance for an input, float64 ``[1, C]`` or ``[N, C]``.

        Args:
            layer: layer to normalize.
            x: input of the layer, shape ``[N, C, *]``; N may be zero.
        """


class EvalStatisticsMixin(_BatchNorm):
    """Batch-norm layer that normalizes with the statistics of its rule in evaluation.

    In training, it uses the forward of its base class. The class is derived from the layer's class,
    so the layer is still an instance of it.
    """

    _syncbn_rule: EvalStatistics

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the normalized input; only layers of this library accept a residual or a mask.

        Raises:
            ValueError: a mask with statistics that depend on the input.
        """
        if isinstance(input, Proxy):
            return cast(Tensor, record_call(self, input, residual, mask))
        if self.training:
            optional = {"residual": residual, "mask": mask}
            return super().forward(input, **{k: v for k, v in optional.items() if v is not None})
        if mask is not None:
            raise ValueError(
                f"{self._syncbn_rule.layer_name}: got a mask; inference rules support unmasked "
                "inputs only"
            )
        self._check_input_dim(input)
        check_input(input)
        rule = self._syncbn_rule
        tensors = self.weight, self.bias, self.running_mean, self.running_var
        check_parameters(input, *tensors, rule.layer_name or type(self).__name__)
        mean, var = rule.statistics(BNLayer(0, rule.layer_name, self), input)
        invstd = (var + self.eps).rsqrt()
        coefficients = forward_coefficients(mean, invstd, self.weight, self.bias, input.dtype)
        trailing = (1,) * (input.dim() - 2)
        pivot, scale, shift = (c.reshape(*c.shape, *trailing) for c in coefficients)
        y = torch.addcmul(shift, input - pivot, scale).to(input.dtype)
        name = getattr(self, "_syncbn_activation", None)
        activation = check_activation(name, getattr(self, "_syncbn_negative_slope", 0.01))
        return finish_forward(y, residual, activation, None)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The derived class cannot be imported by name, so it is derived again from its base class.
        make, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        kind = type(self)
        arguments = tuple(base_class(kind) if value is kind else value for value in arguments)
        return _remake, (make, arguments), *rest


def with_rule(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    """Return the class derived from a layer's class that uses an inference rule."""
    if kind not in _DERIVED:
        name, namespace = f"EvalStatistics{kind.__name__}", {"__module__": kind.__module__}
        _DERIVED[kind] = type(name, (EvalStatisticsMixin, kind), namespace)
    return _DERIVED[kind]


def base_class(kind: type[_BatchNorm]) -> type[_BatchNorm] | None:
    """Return the class from which :func:`with_rule` derived another; None for other classes."""
    is_derived = kind.__bases__[0] is EvalStatisticsMixin
    return cast("type[_BatchNorm]", kind.__bases__[1]) if is_derived else None


def _remake(make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    layer = make(*arguments)
    layer.__class__ = with_rule(type(layer))
    return layer
