"""The one all-reduce of a layer's forward pass and of its backward pass: a summed float64 vector.

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

from syncbn.distributed import fingerprint
from syncbn.distributed.agreement import as_bytes, disagreement
from syncbn.distributed.groups import group_of_all_ranks

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
        process_group = group_of_all_ranks()
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
    """Return a vector summed over a group.

    The ranks compare fingerprints of their labels with the sum (:mod:`.fingerprint`), so that two
    layers that meet in one all-reduce are an error. With ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` they
    compare the labels themselves, before the sum.

    Args:
        vector: float64, contiguous, the same shape on every rank; may be overwritten.
        group: from :func:`communicating_group`; None leaves the vector as it is.
        label: summed quantity, for fingerprint and error messages: layer, direction, input dtype.
            Empty if the layer is unknown.

    Raises:
        RuntimeError: the ranks disagree on the label, or the transport failed or timed out; the
            message has the label. (NCCL reports failures later, through its watchdog, without it.)
    """
    if group is None:
        return vector
    value = fingerprint.fingerprint(label, vector)
    payload = fingerprint.append(vector, value)
    if torch.compiler.is_compiling():
        payload = functional.all_reduce(payload, "sum", group)
    else:
        _begin(payload, group, label, asynchronous=False)
        fingerprint.check(payload, value, group, label)
    return fingerprint.strip(payload, value, vector.shape[-1])


class Message(NamedTuple):
    """An all-reduce under way.

    Attributes:
        payload: return value of :func:`syncbn.distributed.fingerprint.append`.
        size: length of the vector in it.
        label: label of the all-reduce.
        value: fingerprint of the label; None if the payload has none.
        group: group of the all-reduce; None if it is over.
        work: work object of torch.distributed; None if it is over.
    """

    payload: Tensor
    size: int
    label: str
    value: float | None = None
    group: dist.ProcessGroup | None = None
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """Wait for the sum, on a GPU on the current stream, and return it.

        Raises:
            RuntimeError: as :func:`all_reduce`.
        """
        if self.work is None or self.group is None:
            return self.payload
        try:
            self.work.wait()
        except RuntimeError as error:
            raise _explained(error, self.payload, self.label) from error
        fingerprint.check(self.payload, self.value, self.group, self.label)
        return fingerprint.strip(self.payload, self.value, self.size)


def begin_all_reduce(vector: Tensor, group: dist.ProcessGroup | None, label: str) -> Message:
    """Begin to sum a vector over a group; under ``torch.compile``, sum it.

    Work before :meth:`Message.wait` overlaps with the all-reduce. Arguments and errors are as for
    :func:`all_reduce`.
    """
    if group is None or torch.compiler.is_compiling():
        return Message(all_reduce(vector, group, label), vector.shape[-1], label)
    value = fingerprint.fingerprint(label, vector)
    payload = fingerprint.append(vector, value)
    work = _begin(payload, group, label, asynchronous=True)
    return Message(payload, vector.shape[-1], label, value, group, work)


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
        _, ctx.group, label = inputs
        # Two calls of one layer differ by it in the backward pass.
        ctx.label = f"{label}, call {fingerprint.count(ctx.group)}" if label else ""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (
            sum_over_ranks(grad.contiguous(), ctx.group, _derived(ctx.label, "backward")),
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return sum_over_ranks(tangent, ctx.group, _derived(ctx.label, "tangent"))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, ...], vector: Tensor, group: dist.ProcessGroup, label: str
    ) -> tuple[Tensor, int]:
        samples_first = vector.movedim(in_dims[0], 0).contiguous()
        return sum_over_ranks(samples_first, group, label), 0


def _derived(label: str, direction: str) -> str:
    return f"{label} {direction}" if label else ""


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
        f"{label or 'a compiled layer'}: the all-reduce of {vector.numel()} numbers failed on rank "
        f"{dist.get_rank()} of {dist.get_world_size()}. If another rank ended or never reached "
        "this layer, look there: layers must run in the same order, and with the same input dtype, "
        f"on every rank. {error}"
    )


class _DisagreementError(Exception):
    """Ranks of a group meet in one message with different layers, sizes or dtypes."""


def _require_agreement(vector: Tensor, group: dist.ProcessGroup, label: str) -> None:
    mine = as_bytes(f"{vector.numel()} numbers for {label}").to(vector.device)
    texts = mine.new_empty(group.size(), len(mine))
    dist.all_gather(list(texts), mine, group=group)
    if lines := disagreement(texts, dist.get_process_group_ranks(group)):
        raise _DisagreementError(f"the ranks of a synchronized batch norm disagree:\n{lines}")
