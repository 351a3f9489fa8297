"""Tensors as MPI buffers: staging memory, datatypes, reductions, requests in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.distributed.mpi import MPI, is_cuda_aware

if TYPE_CHECKING:
    from mpi4py.typing import BufSpec

#: A wait tests each request this many times in a row: about 20 us, after which ranks that arrived
#: together have completed all but large collectives.
SPIN_TESTS = 128

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
# Datatypes for copies by element size. Elements, not bytes: before MPI 4, counts end at 2^31.
_COPY_DATATYPES = {
    1: MPI.UINT8_T,
    2: MPI.UINT16_T,
    4: MPI.UINT32_T,
    8: MPI.UINT64_T,
    16: MPI.C_DOUBLE_COMPLEX,
}
# MPI has no half types; a sum in float32 is also more exact.
_REDUCTION_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32}

# MIN and MAX of floats with a NaN may differ between ranks in MPI. Integers in the same order
# cannot.
_ORDERED_INTS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}

# Torch has no division for these.
_NEVER_AVERAGED = (torch.uint16, torch.uint32, torch.uint64)
_SUMS = {_Op.SUM: MPI.SUM, _Op.AVG: MPI.SUM, _Op.PREMUL_SUM: MPI.SUM, _Op.PRODUCT: MPI.PROD}
_ORDERS = {_Op.MIN: MPI.MIN, _Op.MAX: MPI.MAX}
_BITS = {_Op.BAND: MPI.BAND, _Op.BOR: MPI.BOR, _Op.BXOR: MPI.BXOR}
# For torch.bool, with torch's meaning of sums and products.
_LOGICAL = {
    **dict.fromkeys((_Op.SUM, _Op.MAX, _Op.BOR), MPI.LOR),
    **dict.fromkeys((_Op.PRODUCT, _Op.MIN, _Op.BAND), MPI.LAND),
    _Op.BXOR: MPI.LXOR,
}


class PendingRequest(NamedTuple):
    """An MPI request in flight.

    Attributes:
        request: non-blocking request.
        memory: tensors that MPI reads and writes; must live as long as the request.
        finish: copies the result to its tensor; None if MPI writes it there.
        status: status of a receive, with the source rank.
    """

    request: MPI.Request
    memory: tuple[Tensor, ...]
    finish: Callable[[], None] | None = None
    status: MPI.Status | None = None


def all_completed(requests: Iterable[PendingRequest]) -> bool:
    """Return whether requests without a ``finish`` step complete within a short poll."""
    for pending in requests:
        if pending.finish is not None:
            return False
        for _ in range(SPIN_TESTS):
            if pending.request.Test():
                break
        else:
            return False
    return True


class Reduction(NamedTuple):
    """A torch.distributed reduction of one dtype as an MPI reduction.

    Attributes:
        op: MPI operation.
        dtype: dtype of the elements in MPI.
        average: divide the result by the group's size.
        premultiply: multiply by ``factor`` on every rank first.
        ordered: compare floats as integers of the same order; NaN wins.
        factor: factor of PREMUL_SUM.
    """

    op: MPI.Op
    dtype: torch.dtype
    average: bool
    premultiply: bool
    ordered: bool
    factor: float | Tensor = 1.0

    def stage_operand(self, tensor: Tensor) -> Tensor:
        """Return the operand for MPI: the tensor itself if possible, otherwise a copy."""
        if self.premultiply:
            tensor = tensor.detach().to(self.dtype) * self.factor
        elif self.ordered:
            info = torch.iinfo(self.dtype)
            nan = info.max if self.op == MPI.MAX else info.min
            bits = _reorder(tensor.detach().contiguous().resolve_neg().view(self.dtype))
            tensor = bits.masked_fill_(tensor.isnan(), nan)
        return stage_input(tensor, self.dtype)

    def copy_back(self, result: Tensor, tensor: Tensor, size: int) -> None:
        """Finish a reduction over ``size`` ranks in ``result`` and copy it to ``tensor``."""
        if self.average:
            numbers = torch.view_as_real(result) if result.is_complex() else result
            rounding_mode = None if numbers.is_floating_point() else "trunc"
            numbers.detach().div_(size, rounding_mode=rounding_mode)
        elif self.ordered:
            result = _reorder(result).view(tensor.dtype)
        copy_back(result, tensor)


def find_reduction(op: Any, dtype: torch.dtype) -> Reduction:
    """Return the MPI reduction for a torch.distributed reduction.

    Args:
        op: a ``torch.distributed.ReduceOp``.
        dtype: dtype of the elements.

    Raises:
        TypeError: MPI has no such reduction for this dtype.
    """
    reduction = _REDUCTIONS.get((op.op.value, dtype))
    if reduction is None:
        dtypes = dict.fromkeys(str(known).removeprefix("torch.") for _, known in _REDUCTIONS)
        raise TypeError(
            f"MPI cannot reduce {dtype} with {op.op.name}; it supports sums, products and "
            "averages of numbers, MIN and MAX of real numbers, and bitwise operations on integers "
            f"and booleans ({', '.join(dtypes)})"
        )
    return reduction._replace(factor=op.factor) if reduction.premultiply else reduction


def _reductions() -> Iterator[tuple[tuple[int, torch.dtype], Reduction]]:
    for dtype in (*_DATATYPES, *_REDUCTION_DTYPES):
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
            ordered = dtype.is_floating_point and kind in _ORDERS
            mpi_dtype = (_ORDERED_INTS if ordered else _REDUCTION_DTYPES).get(dtype, dtype)
            premultiply = kind == _Op.PREMUL_SUM
            reduction = Reduction(op, mpi_dtype, kind == _Op.AVG, premultiply, ordered)
            yield (kind.value, dtype), reduction


# A table: building a reduction for every collective would take longer than a short all-reduce, and
# hashing the operation instead of its value half as long.
_REDUCTIONS = dict(_reductions())


def _reorder(bits: Tensor) -> Tensor:
    # Maps the bits of floats to integers in the floats' order, and back.
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def stage_input(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the elements in memory that MPI can read and write: contiguous, ready, of a dtype.

    This is the tensor itself if possible. A CUDA tensor's stream is synchronized; unless MPI is
    CUDA-aware, the tensor is copied to pinned host memory.

    Args:
        tensor: dense tensor.
        dtype: dtype of the result; None for the tensor's dtype.

    Raises:
        TypeError: the tensor is not dense.
    """
    if tensor.layout is not torch.strided:
        raise TypeError(f"MPI needs dense tensors, got one with layout {tensor.layout}")
    if not _is_usable(tensor, dtype):
        tensor = alloc_staging(tensor, tensor.numel(), dtype).view_as(tensor).copy_(tensor.detach())
    return _sync_stream(tensor)


def stage_output(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory of a tensor's size for MPI to write: the tensor itself if possible."""
    if _is_usable(tensor, dtype):
        return _sync_stream(tensor)
    return alloc_staging(tensor, tensor.numel(), dtype)


def alloc_staging(like: Tensor, numel: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return new memory that MPI can write, for ``numel`` elements of tensors like this one."""
    device = like.device if _is_accessible(like) else torch.device("cpu")
    pinned = like.device != device
    return _sync_stream(
        torch.empty(numel, dtype=dtype or like.dtype, device=device, pin_memory=pinned)
    )


def copy_back(result: Tensor, tensor: Tensor) -> None:
    """Copy a result to its tensor, unless MPI wrote it there."""
    if result is not tensor:
        tensor.detach().copy_(result.view_as(tensor))


def typed_buffer(tensor: Tensor) -> BufSpec:
    """Return a tensor's memory with its datatype, for a reduction."""
    memory = MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
    return memory, tensor.numel(), _DATATYPES[tensor.dtype]


def raw_buffer(tensor: Tensor, counts: int | list[int] | None = None) -> Any:
    """Return a tensor's memory for a collective that copies elements of any dtype.

    Args:
        tensor: contiguous tensor.
        counts: numbers of elements of the ranks' parts; the size of one for equal parts; None for
            all elements.
    """
    memory = MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
    counts = tensor.numel() if counts is None else counts
    return memory, counts, _COPY_DATATYPES[tensor.element_size()]


def _sync_stream(tensor: Tensor) -> Tensor:
    # MPI ignores streams: queued kernels may still write its input, or read the memory of its
    # output, including memory that the allocator has reused.
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor


def _is_usable(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    if dtype is not None and dtype != tensor.dtype:
        return False
    # The memory of a lazily conjugated or negated tensor does not hold its elements.
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return plain and _is_accessible(tensor)


def _is_accessible(tensor: Tensor) -> bool:
    return tensor.is_cpu or (tensor.is_cuda and is_cuda_aware())
