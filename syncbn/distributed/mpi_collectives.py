"""torch.distributed's operations as non-blocking MPI requests, one function each.

Shapes: W ranks in the communicator. Tensors may be of any dtype where elements are only moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.distributed.mpi_buffers import (
    Reduction,
    content,
    datatype,
    deliver,
    elements,
    landing,
    reachable,
    reduction,
    room,
)
from syncbn.distributed.mpi_library import MPI
from syncbn.distributed.mpi_work import Transfer

if TYPE_CHECKING:
    from mpi4py.typing import BufSpecV


def all_reduce(communicator: MPI.Intracomm, tensor: Tensor, op: dist.ReduceOp) -> Transfer:
    """Reduce a tensor over all ranks, in place."""
    how = reduction(op, tensor.dtype, "all_reduce")
    memory = how.operand(tensor)
    request = communicator.Iallreduce(MPI.IN_PLACE, elements(memory), how.op)
    if memory is tensor and not how.average:
        return Transfer(request, (memory,))
    return Transfer(request, (memory,), partial(how.deliver, memory, tensor, communicator.size))


def reduce(communicator: MPI.Intracomm, tensor: Tensor, op: dist.ReduceOp, root: int) -> Transfer:
    """Reduce a tensor to one rank; the others keep theirs."""
    _expect_rank("reduce", "root", root, communicator)
    how = reduction(op, tensor.dtype, "reduce")
    memory = how.operand(tensor)
    if communicator.rank != root:
        return Transfer(communicator.Ireduce(elements(memory), None, how.op, root), (memory,))
    request = communicator.Ireduce(MPI.IN_PLACE, elements(memory), how.op, root)
    return Transfer(request, (memory,), partial(how.deliver, memory, tensor, communicator.size))


def reduce_scatter(
    communicator: MPI.Intracomm, output: Tensor, inputs: Sequence[Tensor], op: dist.ReduceOp
) -> Transfer:
    """Reduce W tensors, whose sizes may differ; rank i gets the i-th."""
    _expect("reduce_scatter", "inputs", inputs, communicator.size, output.dtype)
    _expect_numel("reduce_scatter", inputs[communicator.rank], output)
    how = reduction(op, output.dtype, "reduce_scatter")
    return _reduce_parts(communicator, output, _flat(inputs), [x.numel() for x in inputs], how)


def reduce_scatter_single(
    communicator: MPI.Intracomm, output: Tensor, tensor: Tensor, op: dist.ReduceOp
) -> Transfer:
    """Reduce a tensor W times as large as the output; rank i gets the i-th part."""
    _expect_blocks("reduce_scatter_single", "input", tensor, output, communicator.size)
    how = reduction(op, output.dtype, "reduce_scatter_single")
    counts = [output.numel()] * communicator.size
    return _reduce_parts(communicator, output, tensor, counts, how)


def _reduce_parts(
    communicator: MPI.Intracomm, output: Tensor, tensor: Tensor, counts: list[int], how: Reduction
) -> Transfer:
    result = landing(output, how.dtype)
    operand = how.operand(_apart(tensor, result))
    request = communicator.Ireduce_scatter(elements(operand), elements(result), counts, how.op)
    finish = partial(how.deliver, result, output, communicator.size)
    return Transfer(request, (operand, result), finish)


def broadcast(communicator: MPI.Intracomm, tensor: Tensor, root: int) -> Transfer:
    """Copy a tensor from one rank to all."""
    _expect_rank("broadcast", "root", root, communicator)
    memory = reachable(tensor)
    request = communicator.Ibcast(content(memory), root)
    return Transfer(request, (memory,), _delivery(memory, tensor))


def all_gather(communicator: MPI.Intracomm, outputs: Sequence[Tensor], tensor: Tensor) -> Transfer:
    """Gather the tensors of all ranks, whose sizes may differ, in W tensors."""
    _expect("all_gather", "outputs", outputs, communicator.size, tensor.dtype)
    _expect_numel("all_gather", outputs[communicator.rank], tensor)
    source, result = reachable(tensor), _room_for(outputs)
    request = communicator.Iallgatherv(content(source), _parts(result, outputs))
    return Transfer(request, (source, result), partial(_distribute, result, outputs))


def all_gather_single(communicator: MPI.Intracomm, output: Tensor, tensor: Tensor) -> Transfer:
    """Gather tensors of one size in a tensor W times as large."""
    _expect_blocks("all_gather_single", "output", output, tensor, communicator.size)
    result = landing(output)
    source = reachable(_apart(tensor, result))
    request = communicator.Iallgather(content(source), content(result, communicator.size))
    return Transfer(request, (source, result), _delivery(result, output))


def gather(
    communicator: MPI.Intracomm, outputs: Sequence[Tensor], tensor: Tensor, root: int
) -> Transfer:
    """Gather the tensors of all ranks, whose sizes may differ, in W tensors of one rank."""
    _expect_rank("gather", "root", root, communicator)
    source = reachable(tensor)
    if communicator.rank != root:
        return Transfer(communicator.Igatherv(content(source), None, root), (source,))
    _expect("gather", "outputs", outputs, communicator.size, tensor.dtype)
    _expect_numel("gather", outputs[root], tensor)
    result = _room_for(outputs)
    request = communicator.Igatherv(content(source), _parts(result, outputs), root)
    return Transfer(request, (source, result), partial(_distribute, result, outputs))


def scatter(
    communicator: MPI.Intracomm, output: Tensor, inputs: Sequence[Tensor], root: int
) -> Transfer:
    """Give every rank one of the W tensors of one rank, whose sizes may differ."""
    _expect_rank("scatter", "root", root, communicator)
    result = landing(output)
    finish = _delivery(result, output)
    if communicator.rank != root:
        return Transfer(communicator.Iscatterv(None, content(result), root), (result,), finish)
    _expect("scatter", "inputs", inputs, communicator.size, output.dtype)
    _expect_numel("scatter", inputs[root], output)
    source = reachable(_flat(inputs))
    request = communicator.Iscatterv(_parts(source, inputs), content(result), root)
    return Transfer(request, (source, result), finish)


def all_to_all(
    communicator: MPI.Intracomm, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Transfer:
    """Send the i-th of W tensors to rank i; sizes may differ."""
    dtype = next((tensor.dtype for tensor in inputs), None)
    _expect("all_to_all", "inputs", inputs, communicator.size, dtype)
    _expect("all_to_all", "outputs", outputs, communicator.size, dtype)
    _expect_numel("all_to_all", outputs[communicator.rank], inputs[communicator.rank])
    source, result = reachable(_flat(inputs)), _room_for(outputs)
    request = communicator.Ialltoallv(_parts(source, inputs), _parts(result, outputs))
    return Transfer(request, (source, result), partial(_distribute, result, outputs))


def all_to_all_single(
    communicator: MPI.Intracomm,
    output: Tensor,
    tensor: Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
) -> Transfer:
    """Send the i-th part of a tensor, along its first dimension, to rank i; sizes may differ."""
    size, name = communicator.size, "all_to_all_single"
    outputs = splits(output, output_splits, size, name)
    return all_to_all(communicator, outputs, splits(tensor, input_splits, size, name))


def send(communicator: MPI.Intracomm, tensor: Tensor, destination: int, tag: int) -> Transfer:
    """Send a tensor to one rank."""
    _expect_rank("send", "destination", destination, communicator)
    _expect_tag("send", tag, communicator)
    memory = reachable(tensor)
    return Transfer(communicator.Isend(content(memory), destination, tag), (memory,))


def receive(communicator: MPI.Intracomm, tensor: Tensor, source: int | None, tag: int) -> Transfer:
    """Receive a tensor from one rank, or from any if the source is None."""
    if source is None:
        source = MPI.ANY_SOURCE
    else:
        _expect_rank("recv", "source", source, communicator)
    _expect_tag("recv", tag, communicator)
    memory, status = landing(tensor), MPI.Status()
    request = communicator.Irecv(content(memory), source, tag)
    return Transfer(request, (memory,), partial(_accept, status, memory, tensor), status)


def barrier(communicator: MPI.Intracomm) -> Transfer:
    """Wait for all ranks."""
    return Transfer(communicator.Ibarrier(), ())


def splits(tensor: Tensor, sizes: Sequence[int], world_size: int, name: str) -> list[Tensor]:
    """Return a tensor's parts along its first dimension: of the given sizes, or W equal ones.

    Raises:
        ValueError: the first dimension does not have that size.
    """
    if tensor.dim() == 0:
        raise ValueError(f"{name}: got a tensor without dimensions; expected one with rows")
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


def _accept(status: MPI.Status, memory: Tensor, tensor: Tensor) -> None:
    # MPI itself takes a shorter message without a word.
    got = status.Get_count(MPI.BYTE)
    if got != memory.nbytes:
        raise RuntimeError(
            f"recv: rank {status.Get_source()} of the group sent {got} bytes; expected "
            f"{memory.nbytes} for {memory.numel()} {memory.dtype}"
        )
    deliver(memory, tensor)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _room_for(tensors: Sequence[Tensor]) -> Tensor:
    return room(tensors[0], sum(tensor.numel() for tensor in tensors))


def _parts(memory: Tensor, tensors: Sequence[Tensor]) -> BufSpecV:
    buffer = MPI.buffer.fromaddress(memory.data_ptr(), memory.nbytes)
    return buffer, [tensor.numel() for tensor in tensors], datatype(memory)


def _distribute(result: Tensor, outputs: Sequence[Tensor]) -> None:
    parts = result.split([output.numel() for output in outputs])
    for part, output in zip(parts, outputs, strict=True):
        deliver(part, output)


def _delivery(result: Tensor, tensor: Tensor) -> partial[None] | None:
    return None if result is tensor else partial(deliver, result, tensor)


def _apart(tensor: Tensor, result: Tensor) -> Tensor:
    # MPI forbids overlapping buffers; torch lets the input and the output be parts of each other.
    # A tensor that is not contiguous is copied anyway.
    first, last = result.data_ptr(), result.data_ptr() + result.nbytes
    overlaps = tensor.data_ptr() < last and first < tensor.data_ptr() + tensor.nbytes
    return tensor.detach().clone() if overlaps else tensor


# To MPI, some numbers that are no ranks mean "anyone" or "nobody"; others would break the group.
def _expect_rank(name: str, what: str, rank: int, communicator: MPI.Intracomm) -> None:
    if not 0 <= rank < communicator.size:
        raise ValueError(
            f"{name}: got {what} {rank}; expected a rank of the group, 0 to {communicator.size - 1}"
        )


def _expect_tag(name: str, tag: int, communicator: MPI.Intracomm) -> None:
    largest: Any = communicator.Get_attr(MPI.TAG_UB)
    if not 0 <= tag <= largest:
        raise ValueError(f"{name}: got tag {tag}; expected 0 to {largest}")


def _expect(
    name: str, what: str, tensors: Sequence[Tensor], world_size: int, dtype: torch.dtype | None
) -> None:
    if len(tensors) != world_size or any(tensor.dtype != dtype for tensor in tensors):
        dtypes = sorted({str(tensor.dtype) for tensor in tensors})
        raise ValueError(
            f"{name}: got {len(tensors)} {what} of {', '.join(dtypes) or 'no dtype'}; expected "
            f"{world_size} of {dtype or 'one dtype'}, one for every rank of the group"
        )


def _expect_blocks(name: str, what: str, whole: Tensor, part: Tensor, world_size: int) -> None:
    if whole.numel() != world_size * part.numel() or whole.dtype != part.dtype:
        raise ValueError(
            f"{name}: got an {what} of {whole.numel()} {whole.dtype} for {world_size} parts of "
            f"{part.numel()} {part.dtype}; expected {world_size * part.numel()} {part.dtype}"
        )


def _expect_numel(name: str, ours: Tensor, tensor: Tensor) -> None:
    if ours.numel() != tensor.numel():
        raise ValueError(
            f"{name}: this rank's own parts differ: {ours.numel()} and {tensor.numel()} elements"
        )
