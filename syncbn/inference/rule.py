"""What an inference rule is, and a layer that follows one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.calibration.layers import Layer
from syncbn.kernels.coefficients import forward_coefficients
from syncbn.nn.fx_call import record_call
from syncbn.ops.functional import add_residual_relu
from syncbn.ops.validation import check_input, check_parameters

# One for each class met, so that layers of one class stay of one class.
_RULED: dict[type[_BatchNorm], type[_BatchNorm]] = {}


class Rule(nn.Module, ABC):
    """Which statistics one layer normalizes an input with in evaluation.

    A module so that what it holds moves with the model; it adds nothing to a ``state_dict``.

    Attributes:
        layer_name: of the layer that follows it, for error messages.
    """

    layer_name: str = ""

    @property
    @abstractmethod
    def is_evaluation(self) -> bool:
        """Whether the statistics are the running ones, whatever the input."""

    @abstractmethod
    def statistics(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance for an input.

        Args:
            layer: whose input it is.
            x: ``[N, C, *]``; N may be zero.

        Returns:
            Mean and variance, float64 ``[1, C]`` or ``[N, C]``.
        """


class Ruled(_BatchNorm):
    """A batch-norm layer that follows its ``_syncbn_rule`` in evaluation; in training, its class.

    Mixed into the class that the layer had, so that it stays an instance of it.
    """

    _syncbn_rule: Rule

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalize; a residual and a mask are for layers of ours.

        Raises:
            ValueError: there is a mask, and the statistics are to be those of the input.
        """
        if isinstance(input, Proxy):
            return cast(Tensor, record_call(self, input, residual, mask))
        if self.training or self._syncbn_rule.is_evaluation:
            more = {"residual": residual, "mask": mask}
            return super().forward(input, **{k: v for k, v in more.items() if v is not None})
        if mask is not None:
            raise ValueError(
                f"{self._syncbn_rule.layer_name}: got a mask; inference rules take inputs that "
                "count everywhere"
            )
        self._check_input_dim(input)
        check_input(input)
        rule = self._syncbn_rule
        tensors = self.weight, self.bias, self.running_mean, self.running_var
        check_parameters(input, *tensors, rule.layer_name)
        mean, var = rule.statistics(Layer(0, rule.layer_name, self), input)
        invstd = (var + self.eps).rsqrt()
        numbers = forward_coefficients(mean, invstd, self.weight, self.bias, input.dtype)
        trailing = (1,) * (input.dim() - 2)
        pivot, scale, shift = (number.reshape(*number.shape, *trailing) for number in numbers)
        y = torch.addcmul(shift, input - pivot, scale).to(input.dtype)
        return add_residual_relu(
            y, residual, getattr(self, "_syncbn_activation", None) is not None, None
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles written before the private name.
        modules = state["_modules"]
        if isinstance(modules.get("inference_rule"), Rule) and "_syncbn_rule" not in modules:
            modules["_syncbn_rule"] = modules.pop("inference_rule")
        super().__setstate__(state)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no name to import it by: it is made again from the one beneath.
        make, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        kind = type(self)
        arguments = tuple(beneath(kind) if value is kind else value for value in arguments)
        return _remake, (make, arguments), *rest


def ruled(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    """Return the form of a layer's class that follows a rule."""
    if kind not in _RULED:
        namespace = {"__module__": kind.__module__}
        _RULED[kind] = type(f"Ruled{kind.__name__}", (Ruled, kind), namespace)
    return _RULED[kind]


def beneath(kind: type[_BatchNorm]) -> type[_BatchNorm] | None:
    """Return the class that :func:`ruled` made another one from; None if it did not."""
    return cast("type[_BatchNorm]", kind.__bases__[1]) if kind.__bases__[0] is Ruled else None


def _remake(make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    layer = make(*arguments)
    layer.__class__ = ruled(type(layer))
    return layer
