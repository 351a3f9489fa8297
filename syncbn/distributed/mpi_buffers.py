"""Tensors as MPI sees them: memory, element types, reductions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.distributed.mpi_library import MPI, reads_cuda_memory

if TYPE_CHECKING:
    from mpi4py.typing import BufSpec

_Op: Any = dist.ReduceOp.RedOpType  # torch's stubs lack its members

_DATATYPES = {
    torch.bool: MPI.C_BOOL,
    torch.uint8: MPI.UINT8_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
}
# By size in bytes. Whole elements, not bytes: MPI before version 4 counts to 2^31.
_MOVED_AS = {
    1: MPI.UINT8_T,
    2: MPI.UINT16_T,
    4: MPI.UINT32_T,
    8: MPI.UINT64_T,
    16: MPI.C_DOUBLE_COMPLEX,
}
# MPI has no half types; a sum of halves in float32 is also the more exact one.
_REDUCED_IN = {torch.float16: torch.float32, torch.bfloat16: torch.float32}

# Where there is a NaN, the MIN and MAX of floats may differ from rank to rank in MPI; those of
# whole numbers in the same order cannot.
_COMPARED_AS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}

# Torch does not divide these.
_NEVER_AVERAGED = (torch.uint16, torch.uint32, torch.uint64)
_SUMS = {_Op.SUM: MPI.SUM, _Op.AVG: MPI.SUM, _Op.PREMUL_SUM: MPI.SUM, _Op.PRODUCT: MPI.PROD}
_ORDERS = {_Op.MIN: MPI.MIN, _Op.MAX: MPI.MAX}
_BITS = {_Op.BAND: MPI.BAND, _Op.BOR: MPI.BOR, _Op.BXOR: MPI.BXOR}
# Of truth values, as torch adds and multiplies them.
_LOGICAL = {
    **dict.fromkeys((_Op.SUM, _Op.MAX, _Op.BOR), MPI.LOR),
    **dict.fromkeys((_Op.PRODUCT, _Op.MIN, _Op.BAND), MPI.LAND),
    _Op.BXOR: MPI.LXOR,
}


class Reduction(NamedTuple):
    """A reduction of one dtype: how its elements go to MPI and what remains to do after it.

    Attributes:
        op: what MPI applies.
        dtype: what the elements are converted to for it.
        average: divide by the size of the group after.
        scaled: every rank multiplies by a factor before.
        compared: floats, whose order is that of the whole numbers that MPI gets; NaN wins.
        factor: by which ranks multiply.
    """

    op: MPI.Op
    dtype: torch.dtype
    average: bool
    scaled: bool
    compared: bool
    factor: float | Tensor = 1.0

    def operand(self, tensor: Tensor) -> Tensor:
        """Return what MPI reduces: the tensor itself if it can, else a converted copy."""
        if self.scaled:
            tensor = tensor.detach().to(self.dtype) * self.factor
        elif self.compared:
            info = torch.iinfo(self.dtype)
            nan = info.max if self.op == MPI.MAX else info.min
            numbers = _in_order(tensor.detach().contiguous().resolve_neg().view(self.dtype))
            tensor = numbers.masked_fill_(tensor.isnan(), nan)
        return reachable(tensor, self.dtype)

    def deliver(self, result: Tensor, tensor: Tensor, size: int) -> None:
        """Finish a result and put it into the tensor it belongs to (which it may be)."""
        if self.average:
            numbers = torch.view_as_real(result) if result.is_complex() else result
            rounding_mode = None if numbers.is_floating_point() else "trunc"
            numbers.detach().div_(size, rounding_mode=rounding_mode)
        elif self.compared:
            result = _in_order(result).view(tensor.dtype)
        deliver(result, tensor)


def reduction(op: Any, dtype: torch.dtype, what: str) -> Reduction:
    """Return how MPI does a torch.distributed reduction.

    Args:
        op: a ``torch.distributed.ReduceOp``.
        dtype: of the elements.
        what: the collective, for the message.

    Raises:
        TypeError: MPI has no such reduction of this dtype.
    """
    how = _REDUCTIONS.get((op.op.value, dtype))
    if how is None:
        dtypes = dict.fromkeys(str(known).removeprefix("torch.") for _, known in _REDUCTIONS)
        raise TypeError(
            f"{what}: MPI cannot reduce {dtype} with {op.op.name}; it adds, multiplies and "
            "averages numbers, orders real ones, and combines bits of integers and truth values "
            f"({', '.join(dtypes)})"
        )
    return how._replace(factor=op.factor) if how.scaled else how


def _reductions() -> Iterator[tuple[tuple[int, torch.dtype], Reduction]]:
    for dtype in (*_DATATYPES, *_REDUCED_IN):
        if dtype is torch.bool:
            ops = _LOGICAL
        elif dtype.is_complex:
            ops = _SUMS
        elif dtype.is_floating_point:
            ops = _SUMS | _ORDERS
        else:
            ops = _SUMS | _ORDERS | _BITS
        if dtype in _NEVER_AVERAGED:
            ops = {kind: op for kind, op in ops.items() if kind not in (_Op.AVG, _Op.PREMUL_SUM)}
        for kind, op in ops.items():
            compared = dtype.is_floating_point and kind in _ORDERS
            reduced_in = (_COMPARED_AS if compared else _REDUCED_IN).get(dtype, dtype)
            how = Reduction(op, reduced_in, kind == _Op.AVG, kind == _Op.PREMUL_SUM, compared)
            yield (kind.value, dtype), how


# Looked up for every message: building them each time would take longer than a short message, and
# hashing the operation instead of its value as long as half of one.
_REDUCTIONS = dict(_reductions())


def _in_order(numbers: Tensor) -> Tensor:
    # The bits of floats as whole numbers that have the floats' order; and back.
    info = torch.iinfo(numbers.dtype)
    return numbers ^ ((numbers >> (info.bits - 1)) & info.max)


def reachable(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the elements where MPI can read and write them: contiguous, ready, of a dtype.

    That is the tensor itself where possible. A CUDA tensor is waited for; unless MPI reads CUDA
    memory, it is copied to pinned host memory.

    Args:
        tensor: dense.
        dtype: of the result; None for the tensor's own.

    Raises:
        TypeError: the tensor is not dense.
    """
    if tensor.layout is not torch.strided:
        raise TypeError(f"MPI sends dense tensors, got one with layout {tensor.layout}")
    if not _is_in_place(tensor, dtype):
        tensor = room(tensor, tensor.numel(), dtype).view_as(tensor).copy_(tensor.detach())
    return _at_rest(tensor)


def landing(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory of a tensor's size that MPI can write to: its own if possible, else new."""
    if _is_in_place(tensor, dtype):
        return _at_rest(tensor)
    return room(tensor, tensor.numel(), dtype)


def room(like: Tensor, numel: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return new memory that MPI can write to, for elements that end up in tensors like this."""
    device = like.device if _is_reachable(like) else torch.device("cpu")
    dtype = dtype or like.dtype
    return _at_rest(
        torch.empty(numel, dtype=dtype, device=device, pin_memory=like.device != device)
    )


def deliver(result: Tensor, tensor: Tensor) -> None:
    """Copy what MPI wrote to the tensor it was meant for, unless it wrote there."""
    if result is not tensor:
        tensor.detach().copy_(result.view_as(tensor))


def elements(tensor: Tensor) -> BufSpec:
    """Return a tensor's memory with its element type, for a reduction."""
    memory = MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
    return memory, tensor.numel(), _DATATYPES[tensor.dtype]


def content(tensor: Tensor, blocks: int = 1) -> BufSpec:
    """Return a tensor's memory for a collective that only moves elements, whatever they are.

    Args:
        tensor: contiguous.
        blocks: equal parts that it consists of; MPI wants the size of one.
    """
    memory = MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
    return memory, tensor.numel() // blocks, datatype(tensor)


def datatype(tensor: Tensor) -> MPI.Datatype:
    """Return the type that moves a tensor's elements."""
    return _MOVED_AS[tensor.element_size()]


def _at_rest(tensor: Tensor) -> Tensor:
    # MPI knows no streams: what is queued may still write what it reads, or read what it writes
    # over, in memory that the allocator has handed on, too.
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor


def _is_in_place(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    if dtype is not None and dtype != tensor.dtype:
        return False
    # What is in the memory of a lazily conjugated or negated tensor is not its elements.
    as_stored = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return as_stored and _is_reachable(tensor)


def _is_reachable(tensor: Tensor) -> bool:
    return tensor.is_cpu or (tensor.is_cuda and reads_cuda_memory())
