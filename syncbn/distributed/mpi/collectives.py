"""torch.distributed's collectives as non-blocking MPI requests, one function each.

Shapes: W is the size of the comm. Copies support tensors of any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    copy_datatype,
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
    reduction = find_reduction(op, tensor.dtype, "all_reduce")
    memory = reduction.stage_operand(tensor)
    request = comm.Iallreduce(MPI.IN_PLACE, typed_buffer(memory), reduction.op)
    complete = memory is tensor and not reduction.average
    finish = None if complete else partial(reduction.copy_back, memory, tensor, comm.size)
    return PendingRequest(request, (memory,), finish)


def reduce(comm: MPI.Intracomm, tensor: Tensor, op: dist.ReduceOp, root: int) -> PendingRequest:
    """Reduce a tensor to one rank; the tensors of other ranks keep their values."""
    _check_rank("reduce", "root", root, comm)
    reduction = find_reduction(op, tensor.dtype, "reduce")
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
    _check_list("reduce_scatter", "inputs", inputs, comm.size, output.dtype)
    _check_own_part("reduce_scatter", inputs[comm.rank], output)
    reduction = find_reduction(op, output.dtype, "reduce_scatter")
    return _reduce_parts(comm, output, _flat(inputs), [x.numel() for x in inputs], reduction)


def reduce_scatter_single(
    comm: MPI.Intracomm, output: Tensor, tensor: Tensor, op: dist.ReduceOp
) -> PendingRequest:
    """Reduce a tensor W times as large as the output; rank i receives the i-th part."""
    _check_blocks("reduce_scatter_single", "input", tensor, output, comm.size)
    reduction = find_reduction(op, output.dtype, "reduce_scatter_single")
    counts = [output.numel()] * comm.size
    return _reduce_parts(comm, output, tensor, counts, reduction)


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
    _check_rank("broadcast", "root", root, comm)
    memory = stage_input(tensor)
    request = comm.Ibcast(raw_buffer(memory), root)
    return PendingRequest(request, (memory,), _copy_if_staged(memory, tensor))


def all_gather(comm: MPI.Intracomm, outputs: Sequence[Tensor], tensor: Tensor) -> PendingRequest:
    """Gather the tensors of all ranks, whose sizes may differ, into W tensors."""
    _check_list("all_gather", "outputs", outputs, comm.size, tensor.dtype)
    _check_own_part("all_gather", outputs[comm.rank], tensor)
    source, result = stage_input(tensor), _alloc_parts(outputs)
    request = comm.Iallgatherv(raw_buffer(source), _split_buffer(result, outputs))
    return PendingRequest(request, (source, result), partial(_copy_back_parts, result, outputs))


def all_gather_single(comm: MPI.Intracomm, output: Tensor, tensor: Tensor) -> PendingRequest:
    """Gather tensors of equal size into a tensor W times as large."""
    _check_blocks("all_gather_single", "output", output, tensor, comm.size)
    result = stage_output(output)
    source = stage_input(_without_overlap(tensor, result))
    request = comm.Iallgather(raw_buffer(source), raw_buffer(result, comm.size))
    return PendingRequest(request, (source, result), _copy_if_staged(result, output))


def gather(
    comm: MPI.Intracomm, outputs: Sequence[Tensor], tensor: Tensor, root: int
) -> PendingRequest:
    """Gather the tensors of all ranks, whose sizes may differ, into W tensors of one rank."""
    _check_rank("gather", "root", root, comm)
    source = stage_input(tensor)
    if comm.rank != root:
        return PendingRequest(comm.Igatherv(raw_buffer(source), None, root), (source,))
    _check_list("gather", "outputs", outputs, comm.size, tensor.dtype)
    _check_own_part("gather", outputs[root], tensor)
    result = _alloc_parts(outputs)
    request = comm.Igatherv(raw_buffer(source), _split_buffer(result, outputs), root)
    return PendingRequest(request, (source, result), partial(_copy_back_parts, result, outputs))


def scatter(
    comm: MPI.Intracomm, output: Tensor, inputs: Sequence[Tensor], root: int
) -> PendingRequest:
    """Send one of the W tensors of one rank to each rank; sizes may differ."""
    _check_rank("scatter", "root", root, comm)
    result = stage_output(output)
    finish = _copy_if_staged(result, output)
    if comm.rank != root:
        return PendingRequest(comm.Iscatterv(None, raw_buffer(result), root), (result,), finish)
    _check_list("scatter", "inputs", inputs, comm.size, output.dtype)
    _check_own_part("scatter", inputs[root], output)
    source = stage_input(_flat(inputs))
    request = comm.Iscatterv(_split_buffer(source, inputs), raw_buffer(result), root)
    return PendingRequest(request, (source, result), finish)


def all_to_all(
    comm: MPI.Intracomm, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> PendingRequest:
    """Send the i-th of W tensors to rank i; sizes may differ."""
    dtype = next((tensor.dtype for tensor in inputs), None)
    _check_list("all_to_all", "inputs", inputs, comm.size, dtype)
    _check_list("all_to_all", "outputs", outputs, comm.size, dtype)
    _check_own_part("all_to_all", outputs[comm.rank], inputs[comm.rank])
    source, result = stage_input(_flat(inputs)), _alloc_parts(outputs)
    request = comm.Ialltoallv(_split_buffer(source, inputs), _split_buffer(result, outputs))
    return PendingRequest(request, (source, result), partial(_copy_back_parts, result, outputs))


def all_to_all_single(
    comm: MPI.Intracomm,
    output: Tensor,
    tensor: Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
) -> PendingRequest:
    """Send the i-th part of a tensor, along its first dimension, to rank i; sizes may differ."""
    size, name = comm.size, "all_to_all_single"
    outputs = split_rows(output, output_splits, size, name)
    return all_to_all(comm, outputs, split_rows(tensor, input_splits, size, name))


def send(comm: MPI.Intracomm, tensor: Tensor, destination: int, tag: int) -> PendingRequest:
    """Send a tensor to one rank."""
    _check_rank("send", "destination", destination, comm)
    _check_tag("send", tag, comm)
    memory = stage_input(tensor)
    return PendingRequest(comm.Isend(raw_buffer(memory), destination, tag), (memory,))


def receive(comm: MPI.Intracomm, tensor: Tensor, source: int | None, tag: int) -> PendingRequest:
    """Receive a tensor from one rank, or from any rank if the source is None."""
    if source is None:
        source = MPI.ANY_SOURCE
    else:
        _check_rank("recv", "source", source, comm)
    _check_tag("recv", tag, comm)
    memory, status = stage_output(tensor), MPI.Status()
    request = comm.Irecv(raw_buffer(memory), source, tag)
    return PendingRequest(
        request, (memory,), partial(_finish_receive, status, memory, tensor), status
    )


def barrier(comm: MPI.Intracomm) -> PendingRequest:
    """Wait for all ranks."""
    return PendingRequest(comm.Ibarrier(), ())


def split_rows(tensor: Tensor, sizes: Sequence[int], world_size: int, name: str) -> list[Tensor]:
    """Split a tensor along its first dimension into parts of the given sizes, or W equal parts.

    Raises:
        ValueError: the sizes do not add up to the first dimension.
    """
    if tensor.dim() == 0:
        raise ValueError(f"{name}: got a tensor without dimensions; expected at least one")
    rows = len(tensor)
    if not sizes:
        if rows % world_size:
            raise ValueError(
                f"{name}: got {rows} rows without split sizes; expected a multiple of {world_size}"
            )
        sizes = [rows // world_size] * world_size
    if len(sizes) != world_size or sum(sizes) != rows or min(sizes) < 0:
        raise ValueError(
            f"{name}: got split sizes {list(sizes)} for {rows} rows; expected {world_size} sizes "
            f"that add up to {rows}"
        )
    return list(tensor.split(list(sizes)))


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


def _alloc_parts(tensors: Sequence[Tensor]) -> Tensor:
    return alloc_staging(tensors[0], sum(tensor.numel() for tensor in tensors))


def _split_buffer(memory: Tensor, tensors: Sequence[Tensor]) -> BufSpecV:
    buffer = MPI.buffer.fromaddress(memory.data_ptr(), memory.nbytes)
    return buffer, [tensor.numel() for tensor in tensors], copy_datatype(memory)


def _copy_back_parts(result: Tensor, outputs: Sequence[Tensor]) -> None:
    parts = result.split([output.numel() for output in outputs])
    for part, output in zip(parts, outputs, strict=True):
        copy_back(part, output)


def _copy_if_staged(result: Tensor, tensor: Tensor) -> partial[None] | None:
    return None if result is tensor else partial(copy_back, result, tensor)


def _without_overlap(tensor: Tensor, result: Tensor) -> Tensor:
    # MPI forbids overlapping buffers; in torch the input may be a part of the output. A tensor that
    # is not contiguous is copied anyway.
    first, last = result.data_ptr(), result.data_ptr() + result.nbytes
    overlaps = tensor.data_ptr() < last and first < tensor.data_ptr() + tensor.nbytes
    return tensor.detach().clone() if overlaps else tensor


# Some invalid ranks are wildcards in MPI (MPI_ANY_SOURCE, MPI_PROC_NULL); the rest break the group.
def _check_rank(name: str, argument: str, rank: int, comm: MPI.Intracomm) -> None:
    if not 0 <= rank < comm.size:
        raise ValueError(
            f"{name}: got {argument} {rank}; expected a rank of the group, 0 to {comm.size - 1}"
        )


def _check_tag(name: str, tag: int, comm: MPI.Intracomm) -> None:
    largest: Any = comm.Get_attr(MPI.TAG_UB)
    if not 0 <= tag <= largest:
        raise ValueError(f"{name}: got tag {tag}; expected 0 to {largest}")


def _check_list(
    name: str, argument: str, tensors: Sequence[Tensor], world_size: int, dtype: torch.dtype | None
) -> None:
    if len(tensors) != world_size or any(tensor.dtype != dtype for tensor in tensors):
        dtypes = sorted({str(tensor.dtype) for tensor in tensors})
        raise ValueError(
            f"{name}: got {len(tensors)} {argument} of {', '.join(dtypes) or 'no dtype'}; expected "
            f"{world_size} of {dtype or 'one dtype'}, one per rank of the group"
        )


def _check_blocks(name: str, argument: str, whole: Tensor, part: Tensor, world_size: int) -> None:
    if whole.numel() != world_size * part.numel() or whole.dtype != part.dtype:
        raise ValueError(
            f"{name}: got an {argument} of {whole.numel()} {whole.dtype} for {world_size} parts of "
            f"{part.numel()} {part.dtype}; expected {world_size * part.numel()} {part.dtype}"
        )


def _check_own_part(name: str, part: Tensor, tensor: Tensor) -> None:
    if part.numel() != tensor.numel():
        raise ValueError(
            f"{name}: this rank's own parts differ: {part.numel()} and {tensor.numel()} elements"
        )
