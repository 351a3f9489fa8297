"""The one message of a layer's forward and the one of its backward: a summed float64 vector.

Collectives know no batch norm. This is the only file that may import private names of
torch.distributed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.autograd import Function

from syncbn.distributed.agreement import as_bytes, disagreement

# As a number: torch's own comparison takes a microsecond.
_DETAIL = dist.DebugLevel.DETAIL.value if dist.is_available() else None


def communicating_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the group to talk to, or None if this process is alone in it.

    Args:
        process_group: a group this rank belongs to; None for all ranks.

    Raises:
        ValueError: this rank is not a member of the group, or it is not a process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError(
                "got a process group, but torch.distributed is not initialized; "
                "call syncbn.init_process_group() first"
            )
        return None
    if process_group is None:
        process_group = dist.group.WORLD
    not_a_member: object = dist.GroupMember.NON_GROUP_MEMBER  # an int
    if process_group == not_a_member:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process group it was given; every rank must "
            "pass a group that it is a member of"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(
            f"got process group {process_group!r}; expected a torch.distributed.ProcessGroup or "
            "None (syncbn.distributed.resolve_group makes one from a description)"
        )
    return process_group if process_group.size() > 1 else None


def all_reduce(vector: Tensor, group: dist.ProcessGroup | None, label: str) -> Tensor:
    """Sum a vector over a group, in place.

    With ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` the ranks first compare their labels, so that two layers
    that meet in one message are reported instead of added up.

    Args:
        vector: contiguous, the same shape and dtype on every rank.
        group: from :func:`communicating_group`; None leaves the vector as it is.
        label: what is being summed, for error messages: the layer and the direction.

    Returns:
        The vector.

    Raises:
        RuntimeError: the ranks disagree on the message (debug level), or the transport failed or
            timed out; the message has the label. (NCCL reports failures later, through its
            watchdog, which knows no label.)
    """
    if group is None:
        return vector
    if torch.compiler.is_compiling():
        summed: Tensor = functional.all_reduce(vector, "sum", group)
        return summed
    _begin(vector, group, label, asynchronous=False)
    return vector


class Message(NamedTuple):
    """A vector that is being summed.

    Attributes:
        vector: is the sum after :meth:`wait`.
        label: what is being summed, for error messages.
        work: torch.distributed's; None if there is nobody to wait for.
    """

    vector: Tensor
    label: str
    work: dist.Work | None

    def wait(self) -> Tensor:
        """Wait until the sum is there; on a GPU, have the current stream do so.

        Returns:
            The vector.

        Raises:
            RuntimeError: as :func:`all_reduce`.
        """
        if self.work is None:
            return self.vector
        try:
            self.work.wait()
        except RuntimeError as error:
            raise _explained(error, self.vector, self.label) from error
        return self.vector


def begin_all_reduce(vector: Tensor, group: dist.ProcessGroup | None, label: str) -> Message:
    """Begin to sum a vector over a group, in place; under ``torch.compile``, sum it.

    What is done before :meth:`Message.wait` may be done beside it. Arguments and errors are those
    of :func:`all_reduce`.
    """
    if group is None or torch.compiler.is_compiling():
        return Message(all_reduce(vector, group, label), label, None)
    return Message(vector, label, _begin(vector, group, label, asynchronous=True))


def sum_over_ranks(vector: Tensor, group: dist.ProcessGroup | None, label: str) -> Tensor:
    """Return a vector summed over a group, with a gradient.

    The gradient is that of the sum of all ranks' losses, so every rank must also run the backward
    pass.

    Args:
        vector: the same shape and dtype on every rank.
        group: from :func:`communicating_group`; None for this process alone.
        label: as for :func:`all_reduce`, whose errors this raises.
    """
    return vector if group is None else _SumOverRanks.apply(vector, group, label)


class _SumOverRanks(Function):
    """s = sum over ranks of v; with the loss L = sum over ranks of L_r, dL/dv = sum of dL_r/ds.

    It is linear: so is its derivative in forward mode, and samples of a vmap are so many vectors.
    """

    @staticmethod
    def forward(vector: Tensor, group: dist.ProcessGroup, label: str) -> Tensor:
        return all_reduce(vector.clone(), group, label)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, ctx.label = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_over_ranks(grad.contiguous(), ctx.group, f"{ctx.label} backward"), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return sum_over_ranks(tangent, ctx.group, f"{ctx.label} tangent")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, ...], vector: Tensor, group: dist.ProcessGroup, label: str
    ) -> tuple[Tensor, int]:
        samples_first = vector.movedim(in_dims[0], 0).contiguous()
        return sum_over_ranks(samples_first, group, label), 0


def _begin(vector: Tensor, group: dist.ProcessGroup, label: str, asynchronous: bool) -> Any:
    """Return torch.distributed's work; None if it is not asynchronous."""
    try:
        if dist.get_debug_level().value == _DETAIL:
            _require_agreement(vector, group, label)
        return dist.all_reduce(vector, group=group, async_op=asynchronous)
    except _DisagreementError as error:
        raise RuntimeError(str(error)) from None
    except RuntimeError as error:
        raise _explained(error, vector, label) from error


def _explained(error: RuntimeError, vector: Tensor, label: str) -> RuntimeError:
    return RuntimeError(
        f"{label}: the all-reduce of {vector.numel()} numbers failed on rank "
        f"{dist.get_rank()} of {dist.get_world_size()}. If another rank ended or never reached "
        f"this layer, look there: layers must run in the same order on every rank. {error}"
    )


class _DisagreementError(Exception):
    """Ranks of a group meet in one message with different layers, sizes or dtypes."""


def _require_agreement(vector: Tensor, group: dist.ProcessGroup, label: str) -> None:
    mine = as_bytes(f"{vector.numel()} numbers for {label}").to(vector.device)
    texts = mine.new_empty(group.size(), len(mine))
    dist.all_gather(list(texts), mine, group=group)
    if lines := disagreement(texts, dist.get_process_group_ranks(group)):
        raise _DisagreementError(f"the ranks of a synchronized batch norm disagree:\n{lines}")
