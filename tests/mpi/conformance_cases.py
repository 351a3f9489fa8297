"""Groups, inputs and expected results of collectives: see conformance.py.

Every rank computes its expected results from the inputs of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
HALVES = (torch.float16, torch.bfloat16)
_COMPLEX = (torch.complex64, torch.complex128)
REDUCED = (torch.bool, *_INTEGERS, *HALVES, torch.float32, torch.float64, *_COMPLEX)
MOVED = (*REDUCED, torch.uint32, torch.float8_e4m3fn)

#: Constructors of tensors; the second argument is the length of uneven tensors.
LAYOUTS: dict[str, Callable[[torch.dtype, int], Tensor]] = {
    "()": lambda dtype, _: torch.empty((), dtype=dtype),
    "(0,)": lambda dtype, _: torch.empty(0, dtype=dtype),
    "(1,)": lambda dtype, _: torch.empty(1, dtype=dtype),
    "(7,)": lambda dtype, _: torch.empty(7, dtype=dtype),
    "(3, 5)": lambda dtype, _: torch.empty(3, 5, dtype=dtype),
    "transposed": lambda dtype, _: torch.empty(5, 3, dtype=dtype).t(),
    "sliced": lambda dtype, _: torch.empty(3, 10, dtype=dtype)[:, ::2],
    "channels_last": lambda dtype, _: torch.empty(2, 2, 2, 3, dtype=dtype).movedim(-1, 1),
    "uneven": lambda dtype, number: torch.empty(2 * number, 3, dtype=dtype),
    "(1000,)": lambda dtype, _: torch.empty(1000, dtype=dtype),
    "(300000,)": lambda dtype, _: torch.empty(300_000, dtype=dtype),
}
#: Of one dtype only. MPI libraries switch algorithms and protocols with the size.
LARGE = ("(1000,)", "(300000,)")
EVEN = tuple(name for name in LAYOUTS if name != "uneven")

_Op: Any = dist.ReduceOp  # torch's stubs lack its members
_FACTOR = 0.5
_PAIRWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}


class Call(NamedTuple):
    """One call of a collective.

    Attributes:
        start: function of ``async_op``; returns works, first the works that fill the outputs.
        outputs: tensors to fill.
        expected: expected values of the outputs.
        operation: name of the reduction.
        detail: further description, for messages.
    """

    start: Callable[..., Any]
    outputs: Sequence[Tensor]
    expected: Sequence[Tensor]
    operation: str = ""
    detail: str = ""


class Case(NamedTuple):
    """A group with the dtype and layout of its tensors.

    Attributes:
        group: group that contains this rank.
        members: global ranks of the group, in its order.
        dtype: dtype of the elements.
        layout: key of LAYOUTS.
    """

    group: Any
    members: tuple[int, ...]
    dtype: torch.dtype
    layout: str

    def __str__(self) -> str:
        return f"{self.dtype} {self.layout} among {self.members}"

    @property
    def rank(self) -> int:
        return self.members.index(dist.get_rank())

    @property
    def size(self) -> int:
        return len(self.members)

    def input(self, member: int | None = None, part: int = 0, number: int = 0) -> Tensor:
        """Return a member's input in new memory; default: this rank."""
        tensor = self._empty(number)
        rank = self.members[self.rank if member is None else member]
        return tensor.copy_(_content(rank, part, self.dtype, tensor.numel()).view(tensor.shape))

    def inputs(self, part: int = 0, number: int = 0) -> list[Tensor]:
        """Return the inputs of all members."""
        return [self.input(member, part, number) for member in range(self.size)]

    def parts(self) -> list[Tensor]:
        """Return this rank's inputs, one per member."""
        return [self.input(part=part, number=part) for part in range(self.size)]

    def blank(self, number: int = 0) -> Tensor:
        """Return an output in new memory, with values that no input has."""
        return self._empty(number).copy_(torch.tensor(9).to(self.dtype))

    def blank_stack(self) -> Tensor:
        """Return an output W times as large; sliced for a sliced layout."""
        if self.layout == "sliced":
            return torch.stack([self.blank()] * (2 * self.size))[::2]
        return torch.stack([self.blank()] * self.size)

    def _empty(self, number: int) -> Tensor:
        return LAYOUTS[self.layout](self.dtype, number)


@cache
def _content(rank: int, part: int, dtype: torch.dtype, numel: int) -> Tensor:
    # Small integers: sums and products of three are exact in any order.
    numbers: Tensor = (torch.arange(numel) * 2 ** (rank + 1) + 4 * rank + 2 * part) % 9
    if dtype is torch.bool:
        numbers = numbers % 3
    elif dtype.is_complex:
        numbers = torch.complex(numbers - 4.0, numbers.flip(0) - 3.0)
    elif dtype.is_signed:
        numbers = numbers - 4
    return numbers.to(dtype)


def operations(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Yield name and ReduceOp of each reduction of a dtype."""
    inexact = dtype.is_floating_point or dtype.is_complex
    yield "SUM", _Op.SUM
    yield "PRODUCT", _Op.PRODUCT
    if dtype is not torch.bool:
        yield "AVG", _Op.AVG
    if not dtype.is_complex:
        yield "MIN", _Op.MIN
        yield "MAX", _Op.MAX
    if inexact:
        yield "PREMUL_SUM", dist._make_nccl_premul_sum(_FACTOR)
    else:
        yield from ((name, getattr(_Op, name)) for name in ("BAND", "BOR", "BXOR"))


def reduced(operation: str, tensors: Sequence[Tensor]) -> Tensor:
    """Return a reduction; halves are reduced in float32, booleans as integers."""
    dtype = tensors[0].dtype
    computed_in = {torch.bool: torch.uint8, **dict.fromkeys(HALVES, torch.float32)}
    values = [tensor.to(computed_in.get(dtype, dtype), copy=True) for tensor in tensors]
    if operation in _PAIRWISE:
        return reduce(_PAIRWISE[operation], values).to(dtype)
    total = reduce(torch.add, values)
    if operation == "PREMUL_SUM":
        total = total * _FACTOR
    elif operation == "AVG":
        # Complex division would round otherwise.
        numbers = torch.view_as_real(total) if dtype.is_complex else total
        numbers.div_(len(tensors), rounding_mode=None if numbers.is_floating_point() else "trunc")
    return total.to(dtype)
