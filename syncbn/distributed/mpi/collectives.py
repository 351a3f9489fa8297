"""torch.distributed's collectives as non-blocking MPI requests, one function each.

Shapes: W is the size of the comm. Copies support tensors of any dtype. Invalid arguments raise
TypeError or ValueError; the group adds the name of the operation to the message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.distributed.mpi import MPI
from syncbn.distributed.mpi.buffers import (
    PendingRequest,
    Reduction,
    alloc_staging,
    copy_back,
    find_reduction,
    raw_buffer,
    stage_input,
    stage_output,
    typed_buffer,
)

if TYPE_CHECKING:
    from mpi4py.typing import BufSpecV


def all_reduce(comm: MPI.Intracomm, tensor: Tensor, op: dist.ReduceOp) -> PendingRequest:
    """Reduce a tensor over all ranks, in place."""
    reduction = find_reduction(op, tensor.dtype)
    memory = reduction.stage_operand(tensor)
    request = comm.Iallreduce(MPI.IN_PLACE, typed_buffer(memory), reduction.op)
    complete = memory is tensor and not reduction.average
    finish = None if complete else partial(reduction.copy_back, memory, tensor, comm.size)
    return PendingRequest(request, (memory,), finish)


def reduce(comm: MPI.Intracomm, tensor: Tensor, op: dist.ReduceOp, root: int) -> PendingRequest:
    """Reduce a tensor to one rank; the tensors of other ranks keep their values."""
    _check_rank("root", root, comm)
    reduction = find_reduction(op, tensor.dtype)
    memory = reduction.stage_operand(tensor)
    if comm.rank != root:
        request = comm.Ireduce(typed_buffer(memory), None, reduction.op, root)
        return PendingRequest(request, (memory,))
    request = comm.Ireduce(MPI.IN_PLACE, typed_buffer(memory), reduction.op, root)
    finish = partial(reduction.copy_back, memory, tensor, comm.size)
    return PendingRequest(request, (memory,), finish)


def reduce_scatter(
    comm: MPI.Intracomm, output: Tensor, inputs: Sequence[Tensor], op: dist.ReduceOp
) -> PendingRequest:
    """Reduce W tensors, whose sizes may differ; rank i receives the i-th sum."""
    _check_parts("inputs", inputs, output, comm)
    reduction = find_reduction(op, output.dtype)
    return _reduce_parts(comm, output, _flat(inputs), [x.numel() for x in inputs], reduction)


def reduce_scatter_single(
    comm: MPI.Intracomm, output: Tensor, tensor: Tensor, op: dist.ReduceOp
) -> PendingRequest:
    """Reduce a tensor W times as large as the output; rank i receives the i-th part."""
    _check_blocks("input", tensor, output, comm)
    reduction = find_reduction(op, output.dtype)
    return _reduce_parts(comm, output, tensor, [output.numel()] * comm.size, reduction)


def _reduce_parts(
    comm: MPI.Intracomm, output: Tensor, tensor: Tensor, counts: list[int], reduction: Reduction
) -> PendingRequest:
    result = stage_output(output, reduction.dtype)
    operand = reduction.stage_operand(_without_overlap(tensor, result))
    buffers = typed_buffer(operand), typed_buffer(result)
    request = comm.Ireduce_scatter(*buffers, counts, reduction.op)
    finish = partial(reduction.copy_back, result, output, comm.size)
    return PendingRequest(request, (operand, result), finish)


def broadcast(comm: MPI.Intracomm, tensor: Tensor, root: int) -> PendingRequest:
    """Copy a tensor from one rank to all."""
    _check_rank("root", root, comm)
    memory = stage_input(tensor)
    request = comm.Ibcast(raw_buffer(memory), root)
    return PendingRequest(request, (memory,), _copy_if_staged(memory, tensor))


def all_gather(comm: MPI.Intracomm, outputs: Sequence[Tensor], tensor: Tensor) -> PendingRequest:
    """Gather the tensors of all ranks, whose sizes may differ, into W tensors."""
    _check_parts("outputs", outputs, tensor, comm)
    source = stage_input(tensor)
    result, buffer, finish = _stage_outputs(outputs)
    request = comm.Iallgatherv(raw_buffer(source), buffer)
    return PendingRequest(request, (source, result), finish)


def all_gather_single(comm: MPI.Intracomm, output: Tensor, tensor: Tensor) -> PendingRequest:
    """Gather tensors of equal size into a tensor W times as large."""
    _check_blocks("output", output, tensor, comm)
    result = stage_output(output)
    source = stage_input(_without_overlap(tensor, result))
    request = comm.Iallgather(raw_buffer(source), raw_buffer(result, tensor.numel()))
    return PendingRequest(request, (source, result), _copy_if_staged(result, output))


def gather(
    comm: MPI.Intracomm, outputs: Sequence[Tensor], tensor: Tensor, root: int
) -> PendingRequest:
    """Gather the tensors of all ranks, whose sizes may differ, into W tensors of one rank."""
    _check_rank("root", root, comm)
    source = stage_input(tensor)
    if comm.rank != root:
        return PendingRequest(comm.Igatherv(raw_buffer(source), None, root), (source,))
    _check_parts("outputs", outputs, tensor, comm)
    result, buffer, finish = _stage_outputs(outputs)
    request = comm.Igatherv(raw_buffer(source), buffer, root)
    return PendingRequest(request, (source, result), finish)


def scatter(
    comm: MPI.Intracomm, output: Tensor, inputs: Sequence[Tensor], root: int
) -> PendingRequest:
    """Send one of the W tensors of one rank to each rank; sizes may differ."""
    _check_rank("root", root, comm)
    result = stage_output(output)
    finish = _copy_if_staged(result, output)
    if comm.rank != root:
        return PendingRequest(comm.Iscatterv(None, raw_buffer(result), root), (result,), finish)
    _check_parts("inputs", inputs, output, comm)
    source, buffer = _stage_inputs(inputs)
    request = comm.Iscatterv(buffer, raw_buffer(result), root)
    return PendingRequest(request, (source, result), finish)


def all_to_all(
    comm: MPI.Intracomm, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> PendingRequest:
    """Send the i-th of W tensors to rank i; sizes may differ."""
    _check_list("inputs", inputs, comm, inputs[0].dtype if inputs else None)
    _check_parts("outputs", outputs, inputs[comm.rank], comm)
    source, source_buffer = _stage_inputs(inputs)
    result, buffer, finish = _stage_outputs(outputs)
    return PendingRequest(comm.Ialltoallv(source_buffer, buffer), (source, result), finish)


def all_to_all_single(
    comm: MPI.Intracomm,
    output: Tensor,
    tensor: Tensor,
    output_rows: Sequence[int],
    input_rows: Sequence[int],
) -> PendingRequest:
    """Send the i-th part of a tensor, along its first dimension, to rank i; sizes may differ."""
    inputs = _split_rows(tensor, input_rows, comm.size)
    return all_to_all(comm, _split_rows(output, output_rows, comm.size), inputs)


def send(comm: MPI.Intracomm, tensor: Tensor, destination: int, tag: int) -> PendingRequest:
    """Send a tensor to one rank."""
    _check_rank("destination", destination, comm)
    _check_tag(tag, comm)
    memory = stage_input(tensor)
    return PendingRequest(comm.Isend(raw_buffer(memory), destination, tag), (memory,))


def receive(comm: MPI.Intracomm, tensor: Tensor, source: int | None, tag: int) -> PendingRequest:
    """Receive a tensor from one rank, or from any rank if the source is None."""
    if source is None:
        source = MPI.ANY_SOURCE
    else:
        _check_rank("source", source, comm)
    _check_tag(tag, comm)
    memory, status = stage_output(tensor), MPI.Status()
    finish = partial(_finish_receive, status, memory, tensor)
    request = comm.Irecv(raw_buffer(memory), source, tag)
    return PendingRequest(request, (memory,), finish, status)


def barrier(comm: MPI.Intracomm) -> PendingRequest:
    """Wait for all ranks."""
    return PendingRequest(comm.Ibarrier(), ())


def _split_rows(tensor: Tensor, rows: Sequence[int], world_size: int) -> list[Tensor]:
    """Split a tensor along its first dimension into parts of the given rows, or W equal parts."""
    if tensor.dim() == 0:
        raise ValueError("got a tensor without dimensions; expected at least one")
    total = len(tensor)
    if not rows and total % world_size:
        raise ValueError(
            f"got {total} rows without split sizes; expected a multiple of {world_size}"
        )
    rows = list(rows) or [total // world_size] * world_size
    if len(rows) != world_size or sum(rows) != total or min(rows) < 0:
        raise ValueError(
            f"got split sizes {rows} for {total} rows; expected {world_size} sizes that add up to "
            f"{total}"
        )
    return list(tensor.split(rows))


def _finish_receive(status: MPI.Status, memory: Tensor, tensor: Tensor) -> None:
    # MPI accepts a shorter message silently.
    got = status.Get_count(MPI.BYTE)
    if got != memory.nbytes:
        raise RuntimeError(
            f"recv: rank {status.Get_source()} of the group sent {got} bytes; expected "
            f"{memory.nbytes} for {memory.numel()} {memory.dtype}"
        )
    copy_back(memory, tensor)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _stage_inputs(tensors: Sequence[Tensor]) -> tuple[Tensor, BufSpecV]:
    """Return the elements of all tensors in one, and its buffer."""
    source = stage_input(_flat(tensors))
    return source, raw_buffer(source, [tensor.numel() for tensor in tensors])


def _stage_outputs(tensors: Sequence[Tensor]) -> tuple[Tensor, BufSpecV, Callable[[], None]]:
    """Return memory for all tensors, its buffer, and a function that copies it to the tensors."""
    sizes = [tensor.numel() for tensor in tensors]
    result = alloc_staging(tensors[0], sum(sizes))

    def finish() -> None:
        for part, tensor in zip(result.split(sizes), tensors, strict=True):
            copy_back(part, tensor)

    return result, raw_buffer(result, sizes), finish


def _copy_if_staged(result: Tensor, tensor: Tensor) -> partial[None] | None:
    return None if result is tensor else partial(copy_back, result, tensor)


def _without_overlap(tensor: Tensor, result: Tensor) -> Tensor:
    # MPI forbids overlapping buffers; in torch the input may be a part of the output. A tensor that
    # is not contiguous is copied anyway.
    first, last = result.data_ptr(), result.data_ptr() + result.nbytes
    overlaps = tensor.data_ptr() < last and first < tensor.data_ptr() + tensor.nbytes
    return tensor.detach().clone() if overlaps else tensor


# Some invalid ranks are wildcards in MPI (MPI_ANY_SOURCE, MPI_PROC_NULL); the rest break the group.
def _check_rank(argument: str, rank: int, comm: MPI.Intracomm) -> None:
    if not 0 <= rank < comm.size:
        raise ValueError(
            f"got {argument} {rank}; expected a rank of the group, 0 to {comm.size - 1}"
        )


def _check_tag(tag: int, comm: MPI.Intracomm) -> None:
    largest: Any = comm.Get_attr(MPI.TAG_UB)
    if not 0 <= tag <= largest:
        raise ValueError(f"got tag {tag}; expected 0 to {largest}")


def _check_list(
    argument: str, tensors: Sequence[Tensor], comm: MPI.Intracomm, dtype: torch.dtype | None
) -> None:
    if len(tensors) != comm.size or any(tensor.dtype != dtype for tensor in tensors):
        dtypes = sorted({str(tensor.dtype) for tensor in tensors})
        raise ValueError(
            f"got {len(tensors)} {argument} of {', '.join(dtypes) or 'no dtype'}; expected "
            f"{comm.size} of {dtype or 'one dtype'}, one per rank of the group"
        )


def _check_parts(argument: str, parts: Sequence[Tensor], own: Tensor, comm: MPI.Intracomm) -> None:
    _check_list(argument, parts, comm, own.dtype)
    if parts[comm.rank].numel() != own.numel():
        raise ValueError(
            f"this rank's own parts differ: {parts[comm.rank].numel()} and {own.numel()} elements"
        )


def _check_blocks(argument: str, whole: Tensor, part: Tensor, comm: MPI.Intracomm) -> None:
    if whole.numel() != comm.size * part.numel() or whole.dtype != part.dtype:
        raise ValueError(
            f"got an {argument} of {whole.numel()} {whole.dtype} for {comm.size} parts of "
            f"{part.numel()} {part.dtype}; expected {comm.size * part.numel()} {part.dtype}"
        )
