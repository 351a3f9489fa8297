"""All-reduce of a float64 vector: one per layer in the forward pass, one in the backward pass.

Collectives are independent of batch norm. This is the only file that may import private names of
torch.distributed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.autograd import Function

from syncbn import modes
from syncbn.distributed import fingerprint, stalls

# The integer value: comparing the enum takes a microsecond.
_DETAIL = dist.DebugLevel.DETAIL.value if dist.is_available() else None


def all_reduce(vector: Tensor, group: dist.ProcessGroup | None, label: str) -> Tensor:
    """Return a vector summed over a group.

    The payload carries a fingerprint of the label (:mod:`.fingerprint`), so two different layers in
    one all-reduce are an error. With ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` the ranks also compare the
    labels themselves before the sum.

    Args:
        vector: float64, contiguous, the same shape on every rank; may be overwritten.
        group: process group, or None for a single rank, which returns the vector unchanged.
        label: summed quantity, for fingerprint and error messages: layer, direction, input dtype.
            Empty if the layer is unknown.

    Raises:
        RuntimeError: the labels differ between ranks, or the transport failed or timed out. The
            message contains the label, except over NCCL, whose watchdog reports failures later.
    """
    if group is None:
        return vector
    value = fingerprint.fingerprint(label, vector)
    payload = fingerprint.append(vector, value)
    if torch.compiler.is_compiling():
        payload = functional.all_reduce(payload, "sum", group)
    else:
        _all_reduce(payload, group, label)
        fingerprint.check(payload, value, group, label)
    return fingerprint.strip(payload, value, vector.shape[-1])


def differentiable_all_reduce(
    vector: Tensor, group: dist.ProcessGroup | None, label: str
) -> Tensor:
    """Return a vector summed over a group, with a gradient.

    The gradient belongs to the sum of all ranks' losses, so every rank must also run the backward
    pass.

    Args:
        vector: float64, the same shape on every rank.
        group: process group, or None for a single rank.
        label: label of the all-reduce; see :func:`all_reduce`, also for the errors.
    """
    return vector if group is None else _DifferentiableAllReduce.apply(vector, group, label)


class _DifferentiableAllReduce(Function):
    """s = sum over ranks of v; with the loss L = sum over ranks of L_r, dL/dv = sum of dL_r/ds.

    The function is linear, so its forward-mode derivative is the same sum, and the samples of a
    vmap are one larger vector.
    """

    @staticmethod
    def forward(vector: Tensor, group: dist.ProcessGroup, label: str) -> Tensor:
        return all_reduce(vector.clone(), group, label)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, label = inputs
        # The call number distinguishes two calls of one layer in the backward pass.
        ctx.label = f"{label}, call {fingerprint.count_checked(ctx.group)}" if label else ""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        label = f"{ctx.label} backward" if ctx.label else ""
        if not modes.is_grads_batched(grad):
            return differentiable_all_reduce(grad.contiguous(), ctx.group, label), None, None
        rows, level = modes.unwrap_batched(grad)
        total = differentiable_all_reduce(rows.contiguous(), ctx.group, label)
        return torch._add_batch_dim(total, 0, level), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        label = f"{ctx.label} tangent" if ctx.label else ""
        return differentiable_all_reduce(tangent, ctx.group, label)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, ...], vector: Tensor, group: dist.ProcessGroup, label: str
    ) -> tuple[Tensor, int]:
        samples_first = vector.movedim(in_dims[0], 0).contiguous()
        return differentiable_all_reduce(samples_first, group, label), 0


def start_all_reduce(payload: Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    """Start the sum of a payload over a group, in place.

    Returns:
        Its work; None from backends that have synchronized already, as NCCL with its stream.
    """
    # Not by dist.all_reduce(async_op=True): over mpi4py, that takes 1.6 times as long.
    options = dist.AllreduceOptions()
    options.asyncOp = False
    return group.allreduce([payload], options)


def _all_reduce(payload: Tensor, group: dist.ProcessGroup, label: str) -> None:
    """Sum a payload over a group, in place."""
    mismatch, absent = "", ""
    # Fake tensors and captured graphs have no labels to compare.
    is_real = type(payload) is Tensor and not fingerprint.is_capturing(payload)
    can_stall = bool(label) and is_real and payload.is_cpu
    try:
        if dist.get_debug_level().value == _DETAIL and is_real:
            mismatch = _compare_labels(payload, group, label)
        if not mismatch:
            work = start_all_reduce(payload, group)
            if work is not None and can_stall:
                stalls.wait(work, group, label)
            elif work is not None:
                work.wait()
    except RuntimeError as error:
        # The message of mpi4py lists the ranks.
        if can_stall and dist.get_backend(group) == "gloo":
            absent = stalls.describe_absent(group, label)
        raise RuntimeError(
            f"{label or 'a compiled layer'}: the all-reduce of {payload.numel()} elements failed "
            f"on rank {dist.get_rank()} of {dist.get_world_size()}{absent and f'; {absent}'}. If "
            "another rank ended or never reached this layer, look there: layers must run in the "
            f"same order, and with the same input dtype, on every rank. {error}"
        ) from error
    if mismatch:
        raise RuntimeError(f"the ranks of a synchronized batch norm disagree:\n{mismatch}")


def _compare_labels(payload: Tensor, group: dist.ProcessGroup, label: str) -> str:
    encoded = fingerprint.encode_label(f"{payload.numel()} elements for {label}")
    encoded = encoded.to(payload.device)
    labels = encoded.new_empty(group.size(), len(encoded))
    dist.all_gather(list(labels), encoded, group=group)
    return fingerprint.describe_mismatch(labels, dist.get_process_group_ranks(group))
