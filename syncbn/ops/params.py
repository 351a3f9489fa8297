"""What the autograd functions are told besides tensors, and the message of the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import modes
from syncbn.distributed import collectives, fingerprint
from syncbn.kernels import Kernel, Running
from syncbn.moments import add_packed
from syncbn.ops import activation_checkpoint as checkpoint
from syncbn.ops import masking
from syncbn.ops.masking import Filling


class Call(NamedTuple):
    """How a batch is normalized.

    Attributes:
        eps: added to the variance.
        relu: whether a ReLU comes last.
        running: averages to move, or None.
        group: from :func:`~syncbn.distributed.collectives.active_group`; None if alone.
        kernel: from :func:`syncbn.kernels.choose`.
        label: names the layer in error messages.
        filling: what stands where values do not count; None if all do.
        pending: packed moments of earlier micro-batches, to which these are added; or None.
        number: number of the forward all-reduce in its group, for the label of the backward one.
    """

    eps: float
    relu: bool
    running: Running | None
    group: dist.ProcessGroup | None
    kernel: Kernel
    label: str
    filling: Filling | None = None
    pending: Tensor | None = None
    number: int = 0

    @property
    def is_usual(self) -> bool:
        """Whether all values count, once, and the message is for this batch alone."""
        if self.filling is not None or self.pending is not None:
            return False
        return torch.compiler.is_compiling() or checkpoint.current() is None

    @property
    def is_alone(self) -> bool:
        """Whether nobody needs the message before the output is there."""
        return self.group is None and self.is_usual

    def about(self, direction: str, x: Tensor) -> str:
        """Return the label of an all-reduce; empty for a layer without label, under compilation."""
        call = f" of call {self.number}" if self.number else ""
        return f"{self.label} {direction}{call}, {x.dtype} input" if self.label else ""

    def numbered(self) -> Call:
        """Return the call with its number, after the forward all-reduce."""
        number = fingerprint.count(self.group)
        return self._replace(number=number) if number else self


def moments(of: Callable[[Tensor], Tensor], x: Tensor, call: Call) -> Tensor:
    """Return the packed moments of the unmasked values of this rank.

    Args:
        of: :meth:`syncbn.kernels.Kernel.moments`.
        x: shape ``[N, C, *]``.
        call: how it is normalized.
    """
    return of(x) if call.filling is None else masking.moments(of, x, call.filling)


def group_message(x: Tensor, call: Call) -> tuple[Tensor, bool]:
    """Return the moments of the group, and whether they are new.

    They are not where activations are recomputed: then they are those of the forward pass, nothing
    is sent, and nothing is added to ``call.pending``.

    Args:
        x: shape ``[N, C, *]``.
        call: how it is normalized.
    """

    def exchange() -> Tensor:
        message = moments(call.kernel.moments, x, call)
        return collectives.all_reduce(message, call.group, call.about("forward", x))

    around = None if torch.compiler.is_compiling() else checkpoint.current()
    if around is None:
        message, is_new = exchange(), True
    else:
        with modes.hidden(x):
            inputs = f"{x.shape[1]} channels and {x.dtype} inputs"
            message, is_new = around.message(exchange, inputs, call.label)
    if is_new and call.pending is not None:
        add_packed(call.pending, message, x.shape[1])
    return message, is_new
