"""torch.distributed's operations as non-blocking MPI requests, one function each.

Shapes: W ranks in the communicator. Tensors may be of any dtype where elements are only moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.distributed.mpi_buffers import (
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
    how = reduction(op, output.dtype, "reduce_scatter")
    _expect("reduce_scatter", "inputs", inputs, communicator.size, output.dtype)
    _expect_numel("reduce_scatter", inputs[communicator.rank], output)
    operand = how.operand(_flat(inputs))
    result = landing(output, how.dtype)
    counts = [part.numel() for part in inputs]
    request = communicator.Ireduce_scatter(elements(operand), elements(result), counts, how.op)
    finish = partial(how.deliver, result, output, communicator.size)
    return Transfer(request, (operand, result), finish)


def broadcast(communicator: MPI.Intracomm, tensor: Tensor, root: int) -> Transfer:
    """Copy a tensor from one rank to all."""
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
    if output.numel() != communicator.size * tensor.numel() or output.dtype != tensor.dtype:
        raise ValueError(
            f"all_gather_single: got an output of {output.numel()} {output.dtype} for "
            f"{communicator.size} inputs of {tensor.numel()} {tensor.dtype}; expected "
            f"{communicator.size * tensor.numel()}"
        )
    result = landing(output)
    source = _apart(reachable(tensor), result)
    request = communicator.Iallgather(content(source), content(result, communicator.size))
    return Transfer(request, (source, result), _delivery(result, output))


def gather(
    communicator: MPI.Intracomm, outputs: Sequence[Tensor], tensor: Tensor, root: int
) -> Transfer:
    """Gather the tensors of all ranks, whose sizes may differ, in W tensors of one rank."""
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
    _expect("all_to_all", "inputs", inputs, communicator.size, inputs[0].dtype)
    _expect("all_to_all", "outputs", outputs, communicator.size, inputs[0].dtype)
    source, result = reachable(_flat(inputs)), _room_for(outputs)
    request = communicator.Ialltoallv(_parts(source, inputs), _parts(result, outputs))
    return Transfer(request, (source, result), partial(_distribute, result, outputs))


def send(communicator: MPI.Intracomm, tensor: Tensor, destination: int, tag: int) -> Transfer:
    """Send a tensor to one rank."""
    memory = reachable(tensor)
    return Transfer(communicator.Isend(content(memory), destination, tag), (memory,))


def receive(communicator: MPI.Intracomm, tensor: Tensor, source: int, tag: int) -> Transfer:
    """Receive a tensor from one rank, or from any with ``MPI.ANY_SOURCE``."""
    memory = landing(tensor)
    request = communicator.Irecv(content(memory), source, tag)
    return Transfer(request, (memory,), _delivery(memory, tensor), MPI.Status())


def splits(tensor: Tensor, sizes: Sequence[int], world_size: int, name: str) -> list[Tensor]:
    """Return a tensor's parts along its first dimension: of the given sizes, or W equal ones.

    Raises:
        ValueError: the first dimension does not have that size.
    """
    rows = tensor.shape[0] if tensor.dim() else 0
    if not sizes:
        if rows % world_size:
            raise ValueError(
                f"{name}: got {rows} rows without split sizes; expected a multiple of {world_size}"
            )
        sizes = [rows // world_size] * world_size
    if len(sizes) != world_size or sum(sizes) != rows:
        raise ValueError(
            f"{name}: got split sizes {list(sizes)} for {rows} rows; expected {world_size} sizes "
            f"that add up to {rows}"
        )
    return list(tensor.split(list(sizes)))


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


def _apart(source: Tensor, result: Tensor) -> Tensor:
    # MPI forbids overlapping buffers; torch lets the input be a part of the output.
    first, last = result.data_ptr(), result.data_ptr() + result.nbytes
    overlaps = source.data_ptr() < last and first < source.data_ptr() + source.nbytes
    return source.clone() if overlaps else source


def _expect(
    name: str, what: str, tensors: Sequence[Tensor], world_size: int, dtype: torch.dtype
) -> None:
    if len(tensors) != world_size or any(tensor.dtype != dtype for tensor in tensors):
        dtypes = sorted({str(tensor.dtype) for tensor in tensors})
        raise ValueError(
            f"{name}: got {len(tensors)} {what} of {', '.join(dtypes) or 'no dtype'}; expected "
            f"{world_size} of {dtype}, one for every rank of the group"
        )


def _expect_numel(name: str, ours: Tensor, tensor: Tensor) -> None:
    if ours.numel() != tensor.numel():
        raise ValueError(
            f"{name}: this rank's own parts differ: {ours.numel()} and {tensor.numel()} elements"
        )
